"""The panel without a browser: its events as the App fires them, and what it then asks of the App."""

import json

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators.executor import ExecutionContext, Executor

URI = "@ecif/fiftyone-ecif/influence_panel"


class Panel:
    """A panel that is open on a dataset, and remembers its state as the App does."""

    def __init__(self, dataset):
        self.dataset, self.state = dataset, {}
        self.view = []
        self.send("on_load")

    def send(self, method, selected=(), **params):
        """Fires an event; what is asked of the App, what is drawn, and the view that comes to the grid, is kept."""
        asked = {
            "dataset_name": self.dataset.name,
            "view": self.view,
            "selected": list(selected),
            "params": {"panel_id": "p", "__method__": method, "panel_state": self.state, **params},
        }
        context = ExecutionContext(request_params=asked, executor=Executor(), operator_uri=URI)
        foo.get_operator(URI).execute(context)
        requests = [request.to_json() for request in context.executor._requests]
        self.asked = [(request["operator_uri"], request["params"]) for request in requests]
        self.view = next((params["view"] for uri, params in self.asked[::-1] if uri == "set_view"), self.view)
        drawn = [params for uri, params in self.asked if uri == "show_panel_output"]
        self.text = json.dumps(drawn[-1], ensure_ascii=False) if drawn else ""
        return self

    def enter(self, name, value):
        """Enters something into an input, which the App tells the panel of where it listens."""
        self.state[name] = value
        return self.send(f"choose_{name}", value=value)

    def data(self, name):
        """The newest data of a plot."""
        found = [
            params["data"][name] for uri, params in self.asked if uri == "patch_panel_data" and name in params["data"]
        ]
        return found[-1]

    def shown(self):
        """The samples that the grid was told to show, in order."""
        stages = [params["view"] for uri, params in self.asked if uri == "set_view"][-1]
        return fo.DatasetView._build(self.dataset, stages).values("id")

    def notices(self):
        return [params["message"] for uri, params in self.asked if uri == "notify"]
