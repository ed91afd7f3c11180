"""The operators through FiftyOne's own registry and executor, and the plugin as it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import pytest
import yaml
from fiftyone.operators.delegated import DelegatedOperationService
from fiftyone.operators.executor import ExecutionContext, Executor

from fiftyone_ecif import EcifError, training

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = "@ecif/fiftyone-ecif"


def operator(name):
    return foo.get_operator(f"{PLUGIN}/{name}")


@pytest.fixture
def options(made):
    return {"target": "tag: val", "model": training.MODEL, "pretrained": made[1], "fit": True, "batch_size": 24}


def resolve(dataset, name, params, view=None):
    """The form of an operator, as JSON, with what the user has entered."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "view": view or [], "params": params}, executor=Executor()
    )
    return operator(name).resolve_input(ctx).to_json()["type"]["properties"]


def run_in_the_app(dataset, params, **request):
    """Executes compute_influence as the App does and returns what it is told to do."""
    ctx = ExecutionContext(
        request_params={"dataset_name": dataset.name, "params": params, **request}, executor=Executor()
    )
    requests = [message.body.to_json() for message in operator("compute_influence").execute(ctx)]
    return [(request["operator_uri"], request["params"]) for request in requests]


def test_yml_lists_what_is_registered():
    listed = yaml.safe_load((ROOT / "fiftyone.yml").read_text())["operators"]
    registered = [op.name for op in foo.list_operators(builtin=False) if op.plugin_name == PLUGIN]
    assert sorted(listed) == sorted(registered)
    assert all(operator(name).config.icon for name in listed)


def test_compute_tag_and_export(dataset, options, tmp_path):
    train = dataset.match_tags("train")
    operator("compute_influence")(train, **options)
    assert train.count("ecif_influence") == len(train)
    assert dataset.match_tags("val").count("ecif_influence") == 0
    result = operator("tag_by_influence")(dataset, count=5, tag="check").result
    assert result == {"tag": "check", "count": 5}
    assert set(dataset.match_tags("check").values("ecif_rank")) == {1, 2, 3, 4, 5}
    path = tmp_path / "check.csv"
    result = operator("export_pairs")(dataset.match_tags("check"), path).result
    assert result == {"path": str(path), "count": 5}
    assert len(path.read_text().splitlines()) == 6


def test_the_function_and_the_operator_give_the_same_numbers(dataset, options, score):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    operator("compute_influence")(train, **options)
    score(train, val, fit=True, brain_key="direct")
    assert train.values("ecif_influence") == train.values("direct_influence")


def test_the_app_sees_progress_then_the_sorted_view(dataset, options):
    messages = run_in_the_app(dataset, {**options, "caption_field": "caption"})
    progress = [params for name, params in messages if name == "set_progress"]
    assert len(progress) > 5
    shares = [params["progress"] for params in progress]
    assert shares == sorted(shares)
    assert progress[-1] == {"label": "Scored 96 pairs, skipped 0", "progress": 1.0}
    rest = dict(messages)
    assert rest["set_active_fields"]["fields"] == ["caption", "ecif_influence", "ecif_rank"]
    assert [stage["_cls"].rsplit(".")[-1] for stage in rest["set_view"]["view"]] == ["Exists", "SortBy"]
    assert rest["notify"]["variant"] == "success"
    assert "reload_dataset" in rest


def test_a_failure_reaches_the_user(dataset, options):
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    messages = dict(run_in_the_app(dataset, options))
    assert messages["notify"]["variant"] == "error"
    assert "which no run wrote" in messages["notify"]["message"]
    assert messages["set_progress"]["label"].startswith("Failed: ")


def test_a_failure_reaches_python(dataset, options):
    with pytest.raises(EcifError, match="neither a file nor a tag"):
        operator("compute_influence")(dataset.match_tags("train"), **options | {"pretrained": "no_such_tag"})


def test_an_empty_selection_is_said(dataset, options):
    messages = dict(run_in_the_app(dataset, options, view_target="SELECTED_SAMPLES", selected=[]))
    assert messages["notify"] == {"message": "No samples are selected", "variant": "error"}


def test_delegated_execution(dataset, options):
    train = dataset.match_tags("train")
    queued = operator("compute_influence")(train, delegate=True, **options)
    assert queued.delegated
    service = DelegatedOperationService()
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    (done,) = service.list_operations(dataset_name=dataset.name)
    assert done.run_state == "completed", done.result and done.result.error
    assert done.status.progress == 1
    assert done.label == "ECIF influence ecif"
    dataset.reload()
    assert train.count("ecif_influence") == len(train)

    params = {"field": "ecif_influence", "direction": "harmful", "limit": "count", "count": 4, "tag": "later"}
    foo.execute_operator(f"{PLUGIN}/tag_by_influence", {"dataset": dataset}, params=params, request_delegation=True)
    service.execute_queued_operations(dataset_name=dataset.name, log=False)
    assert {op.run_state for op in service.list_operations(dataset_name=dataset.name)} == {"completed"}
    assert len(dataset.match_tags("later")) == 4


def test_the_form_offers_what_fits(dataset):
    form = resolve(dataset, "compute_influence", {"caption_field": "caption", "target": "tag: val"})
    assert sorted(form["caption_field"]["type"]["values"]) == ["caption", "spoiled"]
    assert form["target"]["type"]["values"] == ["tag: train", "tag: val"]
    assert form["counts"]["view"]["label"] == "96 pairs will be scored towards 24 validation pairs"
    assert form["shared"]["view"]["label"].startswith("24 validation pairs are also scored")
    assert not form["brain_key"]["invalid"]
    assert "seed" not in form
    assert "seed" in resolve(dataset, "compute_influence", {"advanced": True})


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"model": "ViT-B-23"}, "model", "no model 'ViT-B-23'"),
        ({"pretrained": "gone/model.pt"}, "pretrained", "There is no file"),
        ({"brain_key": "a key"}, "brain_key", "is not a name"),
        ({"target": "tag: lonely"}, "target", "at least 2 pairs"),
        ({"advanced": True, "batch_size": 1}, "batch_size", "at least 2"),
        ({"advanced": True, "proximal": -1}, "proximal", "positive"),
    ],
)
def test_the_form_says_what_is_wrong(dataset, params, field, message):
    dataset.limit(1).tag_samples("lonely")
    form = resolve(dataset, "compute_influence", params)
    assert form[field]["invalid"]
    assert message in form[field]["error_message"]


def test_forms_without_anything_to_work_on_are_blocked(made):
    dataset = fo.Dataset()
    dataset.add_sample(fo.Sample(filepath=made[0].first().filepath))
    assert resolve(dataset, "compute_influence", {})["no_captions"]["invalid"]
    assert resolve(dataset, "tag_by_influence", {})["no_scores"]["invalid"]
    assert resolve(dataset, "export_pairs", {})["no_captions"]["invalid"]
    dataset.delete()


def test_the_tag_form_counts(dataset, options):
    operator("compute_influence")(dataset.match_tags("train"), **options)
    params = {"field": "ecif_influence", "direction": "valuable", "limit": "share", "share": 0.5}
    assert resolve(dataset, "tag_by_influence", params)["preview"]["view"]["label"] == "36 pairs will be tagged"
    wrong = resolve(dataset, "tag_by_influence", params | {"share": 7})
    assert "share=7" in wrong["share"]["error_message"]


def test_the_export_form_protects_a_file(dataset, tmp_path):
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    assert resolve(dataset, "export_pairs", {"path": str(taken)})["path"]["invalid"]
    assert not resolve(dataset, "export_pairs", {"path": str(taken), "overwrite": True})["path"]["invalid"]
    assert resolve(dataset, "export_pairs", {"path": "x.doc"})["path"]["invalid"]


LIST = """
import sys, fiftyone.operators as foo, fiftyone.operators.registry as registry
print(sorted(op.name for op in foo.list_operators(builtin=False)))
assert not registry.OperatorRegistry().list_errors(), registry.OperatorRegistry().list_errors()
assert "torch" not in sys.modules and "open_clip" not in sys.modules
import fiftyone_ecif
print(fiftyone_ecif.__file__)
homes = [m for m in sys.modules.values() if str(getattr(m, "__file__", "")).endswith("fiftyone_ecif/__init__.py")]
assert len(homes) == 1, homes
"""


def list_in_a_fresh_process(plugins, path=""):
    """Lists the operators of a plugins folder in a process that does not see the package under test as installed."""
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    ran = subprocess.run(
        [sys.executable, "-c", hide + LIST],
        cwd=plugins,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-2:]


OPERATORS = "['compute_influence', 'export_pairs', 'tag_by_influence']"


def test_the_plugin_works_from_a_link_where_the_package_is_not_installed(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    found, home = list_in_a_fresh_process(tmp_path)
    assert found == OPERATORS
    assert Path(home) == ROOT / "fiftyone_ecif" / "__init__.py"


def test_the_plugin_works_from_the_wheel(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert {name.split("/")[0] for name in archive.namelist()} == {
            "fiftyone_ecif",
            wheel.name.split("-py3")[0] + ".dist-info",
        }
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    installed = subprocess.run(
        [sys.executable, "-c", "from fiftyone_ecif.cli import main; main()", "plugin", "install"],
        cwd=site,
        env=os.environ | {"FIFTYONE_PLUGINS_DIR": str(plugins), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert installed.returncode == 0, installed.stderr
    assert (plugins / PLUGIN).resolve() == site / "fiftyone_ecif" / "plugin"
    found, home = list_in_a_fresh_process(plugins, site)
    assert found == OPERATORS
    assert Path(home).is_relative_to(site)
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def test_a_missing_dependency_is_an_install_hint(dataset, monkeypatch):
    package = type(operator("compute_influence")).__module__.rpartition(".")[0]
    monkeypatch.setattr(sys.modules[f"{package}.forms"], "MISSING", ["open_clip"])
    for name in ("compute_influence", "tag_by_influence", "export_pairs"):
        assert "pip install" in resolve(dataset, name, {})["missing"]["error_message"]
