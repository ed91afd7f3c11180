"""Operators without a browser: called, their forms, and what they tell the App."""

import fiftyone as fo
import fiftyone.operators as foo
from fiftyone.operators.executor import ExecutionContext, Executor

PLUGIN = "@ecif/fiftyone-ecif"


def operator(name):
    return foo.get_operator(f"{PLUGIN}/{name}")


def shown_ids(dataset, result):
    """The samples of the view that an operator brings to the grid."""
    (view,) = [r["params"]["view"] for r in result.executor.to_json()["requests"] if r["operator_uri"] == "set_view"]
    return fo.DatasetView._build(dataset, view).values("id")


def resolve(dataset, name, params, view=None, **request):
    """The form of an operator, as JSON, with what the user has entered."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "view": view or [], "params": params, **request},
        executor=Executor(),
    )
    return operator(name).resolve_input(ctx).to_json()["type"]["properties"]


def run_in_the_app(dataset, params, name="compute_influence", **request):
    """Executes a job as the App does and returns what it is told to do."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "params": params, **request}, executor=Executor()
    )
    requests = [message.body.to_json() for message in operator(name).execute(ctx)]
    return [(request["operator_uri"], request["params"]) for request in requests]
