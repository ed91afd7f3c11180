"""FiftyOne's conventions that no other test shows. docs/conventions.md lists them all."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import fiftyone as fo
import fiftyone.operators as foo
import fiftyone.plugins as fop
import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from fiftyone.operators.delegated import DelegatedOperationService
from fiftyone.operators.executor import ExecutionContext, Executor
from panel_driver import Panel
from PIL import Image

from fiftyone_ecif import EcifError, compute_influence, compute_misalignment, export_pairs, select_by_influence
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import training

ROOT = Path(__file__).resolve().parents[3]
PLUGIN = "@ecif/fiftyone-ecif"

WITHOUT_DEPENDENCIES = """
import sys, time
import fiftyone.operators as foo, fiftyone.operators.registry as registry, fiftyone.plugins as fop
from fiftyone.operators.executor import ExecutionContext, Executor
from fiftyone.plugins.context import PluginContext
for name in ("torch", "open_clip", "h5py"):
    assert name not in sys.modules, name
    sys.modules[name] = None  # importing it fails, and so does looking for it
definition = fop.get_plugin(sys.argv[1])
start = time.process_time()
PluginContext(definition).register_all()
took = time.process_time() - start
operators = [op for op in foo.list_operators(builtin=False) if op.plugin_name == definition.name]
assert sorted(op.name for op in operators) == sorted(definition.operators)
assert not registry.OperatorRegistry().list_errors()
for op in operators:
    if op.name != "influence_panel":
        form = op.resolve_input(ExecutionContext(request_params={"params": {}}, executor=Executor())).to_json()
        assert "pip install" in form["type"]["properties"]["missing"]["error_message"], op.name
print(took)
"""


def test_the_entry_is_quick_and_does_without_what_is_not_installed():
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEPENDENCIES, PLUGIN], env=os.environ, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.splitlines()[-1]) < 0.5


def test_fiftyone_knows_what_the_plugin_requires():
    required = fop.load_plugin_requirements(PLUGIN)
    (fiftyone,) = [line for line in required if line.startswith("fiftyone")]
    assert fiftyone == fop.get_plugin(PLUGIN).fiftyone_requirement
    assert not [line for line in required if "==" in line]
    fop.ensure_plugin_requirements(PLUGIN, error_level=0)
    fop.ensure_plugin_compatibility(PLUGIN, error_level=0)


def in_the_app(samples, params):
    """Runs the operator as the App does."""
    request = {"dataset_name": samples._dataset.name, "view": samples._serialize(), "params": params}
    ctx = ExecutionContext(request_params=request, executor=Executor())
    told = [message.body.to_json() for message in foo.get_operator(f"{PLUGIN}/compute_influence").execute(ctx)]
    assert told[-1]["params"]["variant"] == "success"


def test_all_ways_to_run_give_identical_scores(made):
    """Each computes everything from the images: tables belong to a dataset."""
    options = {"model": training.MODEL, "pretrained": made[1], "fit": True, "batch_size": 24, "seed": 5}
    entered = options | {"target": "tag: val", "caption_field": "caption", "brain_key": "ecif"}
    operator = foo.get_operator(f"{PLUGIN}/compute_influence")

    def later(samples):
        operator(samples, target="tag: val", delegate=True, **options)
        service = DelegatedOperationService()
        service.execute_queued_operations(dataset_name=samples._dataset.name, log=False)

    def command(samples):
        line = ["score", samples._dataset.name, "--tag", "train", "--target-tag", "val", "--fit", "--seed", "5"]
        line += ["--model", training.MODEL, "--pretrained", made[1], "--batch-size", "24"]
        assert CliRunner().invoke(main, line).exit_code == 0

    ways = {
        "function": lambda samples: compute_influence(
            samples, target=samples._dataset.match_tags("val"), num_workers=0, **options
        ),
        "operator": lambda samples: operator(samples, target="tag: val", **options),
        "App": lambda samples: in_the_app(samples, entered),
        "delegated": later,
        "command": command,
    }
    fields = ["ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank"]
    found = {}
    for way, run in ways.items():
        copy = made[0].clone()
        run(copy.match_tags("train"))
        copy.reload()
        found[way] = copy.match_tags("train").values(fields)
        copy.delete()
    assert None not in found["function"][0]
    assert all(scores == found["function"] for scores in found.values()), found


def test_a_run_on_a_view_touches_no_other_sample(dataset, score, made):
    train = dataset.match_tags("train")
    score(train, dataset.match_tags("val"), brain_key="before")
    part = train.limit(40)
    others = dataset.exclude(part)
    kept = {sample.id: sample.to_dict(include_private=True) for sample in others}
    score(part, dataset.match_tags("val"))
    compute_misalignment(part, model=training.MODEL, pretrained=made[1], num_workers=0, batch_size=24)
    assert part.count("ecif_influence") == part.count("audit_misalignment") == 40
    for sample_id, before in kept.items():
        after = dataset[sample_id].to_dict(include_private=True)
        assert {name: after[name] for name in before} == before  # when it was last changed, too
        assert not [name for name in after.keys() - before.keys() if after[name] is not None]


def test_progress_can_be_a_function(dataset, made):
    seen = []
    compute_misalignment(
        dataset.match_tags("train"),
        model=training.MODEL,
        pretrained=made[1],
        num_workers=0,
        batch_size=24,
        progress=lambda bar: seen.append(bar.progress),
    )
    assert len(seen) > 5
    assert seen[-1] == 1


def test_what_is_no_set_of_images_is_refused_clearly(dataset, score):
    video = fo.Dataset()
    film = fo.Sample("film.mp4", caption="a film")
    film.frames[1] = fo.Frame(filepath=dataset.first().filepath)
    video.add_sample(film)
    dataset.add_sample_field("things", fo.EmbeddedDocumentField, embedded_doc_type=fo.Detections)
    first = dataset.first()
    first["things"] = fo.Detections(detections=[fo.Detection(label="digit", bounding_box=[0, 0, 0.5, 0.5])])
    first.save()
    refused = {"Images are needed": video, "Use a view of whole images": dataset.to_patches("things")}
    for message, samples in (*refused.items(), ("Use a view of whole images", video.to_frames(sample_frames=False))):
        with pytest.raises(EcifError, match=message):
            score(samples, dataset.match_tags("val"))
        with pytest.raises(EcifError, match=message):
            export_pairs(samples, "never.csv")
    form = foo.get_operator(f"{PLUGIN}/compute_influence").resolve_input(
        ExecutionContext(
            request_params={"dataset_name": video.name, "params": {"caption_field": "caption"}}, executor=Executor()
        )
    )
    assert "Images are needed" in form.to_json()["type"]["properties"]["caption_field"]["error_message"]
    video.delete()


def test_a_slice_of_groups_is_scored(made, score, tmp_path):
    grouped = fo.Dataset()
    grouped.add_group_field("group", default="front")
    samples = []
    for sample in made[0]:
        group = fo.Group()
        element = {"tags": sample.tags, "caption": sample.caption}
        samples.append(fo.Sample(sample.filepath, group=group.element("front"), **element))
        samples.append(fo.Sample(str(tmp_path / "none.pcd"), group=group.element("cloud"), **element))
    grouped.add_samples(samples, progress=False)
    front = grouped.select_group_slices(media_type="image")
    train, val = front.match_tags("train"), front.match_tags("val")
    score(train, val)
    assert train.count("ecif_influence") == len(train) == 72
    assert grouped.select_group_slices("cloud").count("ecif_influence") == 0
    grouped.delete()


def test_exports_can_be_read_again(dataset, score, tmp_path):
    train = dataset.match_tags("train")
    score(train, dataset.match_tags("val"))
    wanted = train.sort_by("ecif_influence").limit(10)
    export_pairs(wanted, tmp_path / "pairs.csv")
    export_pairs(wanted, tmp_path / "pairs.json")
    from_csv = fo.Dataset.from_dir(
        dataset_type=fo.types.CSVDataset,
        labels_path=str(tmp_path / "pairs.csv"),
        fields={"filepath": None, "caption": None, "ecif_influence": float},
        progress=False,
    )
    fields = ["filepath", "caption", "ecif_influence"]
    assert from_csv.sort_by("filepath").values(fields) == wanted.sort_by("filepath").values(fields)
    from_csv.delete()

    rows = json.loads((tmp_path / "pairs.json").read_text())
    score_fields = ["ecif_influence", "ecif_positive", "ecif_negative"]
    assert [[row[name] for row in rows] for name in score_fields] == list(wanted.values(score_fields))
    copy = dataset.clone()
    copy.delete_brain_run("ecif")
    copy.set_values("ecif_influence", {row["id"]: row["ecif_influence"] for row in rows}, key_field="id")
    back = copy.select([row["id"] for row in rows], ordered=True)
    assert back.values("ecif_influence") == wanted.values("ecif_influence")
    copy.delete()


def test_nan_is_never_selected(dataset):
    dataset.add_sample_field("mine", fo.FloatField)
    ids = dataset.values("id")
    dataset.set_values("mine", {ids[0]: math.nan, ids[1]: -1.0, ids[2]: 1.0}, key_field="id")
    for direction, expected in (("harmful", [-1.0]), ("valuable", [1.0])):
        for limit in ({"count": 1}, {"share": 0.5}, {"threshold": 0.0}):
            assert select_by_influence(dataset, "mine", direction, **limit).values("mine") == expected


def test_the_panel_leaves_the_view_alone_when_it_opens(dataset, score):
    score(dataset.match_tags("train"), dataset.match_tags("val"))
    panel = Panel(dataset)
    assert panel.state["key"] == "ecif"
    assert not {"set_view", "clear_view", "set_extended_selection"} & {uri for uri, _ in panel.asked}
    listens = type(foo.get_operator(f"{PLUGIN}/influence_panel"))
    assert not hasattr(listens, "on_change_view")  # so what it shows in the grid cannot call it again
    assert not hasattr(listens, "on_change_extended_selection")


def test_the_skill_works_as_it_is_written(made, tmp_path, monkeypatch, capsys):
    (skill,) = fop.list_skills(plugin=PLUGIN)
    assert fop.get_plugin(PLUGIN).skills == [skill.name] == ["curate-pairs"]
    assert skill.category
    assert "CLIP" in skill.description
    names = set(fop.get_plugin(PLUGIN).operators) - {"influence_panel"}
    assert set(re.findall(r"^\| .* \| `(\w+)` \|", skill.content, re.M)) == names
    assert set(re.findall(PLUGIN + r"/(\w+)", skill.content)) == names

    dataset = made[0].clone()
    values = {"your-dataset": dataset.name, "ViT-B-32": training.MODEL, "laion2b_s34b_b79k": made[1]}
    called = []

    def spy(uri, ctx=None, **options):
        called.append((uri, options["params"]))
        return original(uri, ctx, **options)

    original = foo.execute_operator
    monkeypatch.setattr(foo, "execute_operator", spy)
    monkeypatch.chdir(tmp_path)
    variables = {}
    for block in re.findall(r"```python\n(.*?)```", skill.content, re.S):
        for name, value in values.items():
            block = block.replace(f'"{name}"', repr(value))
        exec(compile(block, "SKILL.md", "exec"), variables)
    assert "error " not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"edited.pt", "suspects.csv", "edited2.pt", "pairs.json"}
    assert {"audit", "ecif", "audit2", "ecif2"} == set(dataset.list_brain_runs())
    assert len(dataset.match_tags("worst")) == 10
    for uri, params in called[-len(variables["calls"]) :]:
        assert params == variables["calls"][uri]
        ctx = ExecutionContext(
            request_params={"dataset_name": dataset.name, "params": params | {"advanced": True}}, executor=Executor()
        )
        form = foo.get_operator(uri).resolve_input(ctx).to_json()["type"]["properties"]
        assert set(params) <= set(form), uri
    fields = re.findall(r"`\{key\}_(\w+)`", skill.content)
    written = {name.partition("_")[2] for name in dataset.get_field_schema() if name.startswith(("ecif_", "audit_"))}
    assert set(fields) == written
    dataset.delete()


@pytest.mark.parametrize("page", ["conventions.md", "reliability.md"])
def test_lists_of_tests_name_tests_that_exist(page):
    listed = (ROOT / "docs" / page).read_text()
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", listed):
        (place,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in place.read_text(), f"{file}::{name}"


#: Influence of eight pairs of noise on a model of noise; both are drawn by NumPy, whose streams do not change.
GOLDEN = [
    *(-0.05439513, -0.06797783, -0.01225549, -0.01887384),
    *(-0.08498937, -0.03396668, -0.00555904, -0.05336747),
]


@pytest.fixture
def noise(tmp_path):
    """A dataset and the random weights of a tiny CLIP, the same on every machine."""
    draw = np.random.default_rng(20)
    model = open_clip.create_model("ecif-tiny")
    weights = {}
    for name, value in sorted(model.state_dict().items()):
        if name == "logit_scale" or not value.is_floating_point() or name == "attn_mask":
            weights[name] = torch.tensor(math.log(10.0)) if name == "logit_scale" else value
        else:
            scale = 1.0 if name.endswith("weight") and value.ndim == 1 else 0.0
            spread = 0.1 if value.ndim < 2 else 1 / math.sqrt(value.shape[-1])
            drawn = scale + spread * draw.standard_normal(tuple(value.shape))
            weights[name] = torch.from_numpy(drawn).to(value.dtype)
    torch.save(weights, tmp_path / "noise.pt")
    dataset = fo.Dataset()
    for number in range(12):
        path = tmp_path / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        words = " ".join(draw.choice(["red", "blue", "one", "seven", "left", "above"], 4))
        dataset.add_sample(fo.Sample(str(path), caption=words, tags=["train" if number < 8 else "val"]))
    yield dataset, str(tmp_path / "noise.pt")
    dataset.delete()


def test_golden_scores_of_random_weights(noise):
    dataset, weights = noise
    found = []
    for copy in (dataset, dataset.clone()):
        train = copy.match_tags("train")
        compute_influence(
            train,
            target=copy.match_tags("val"),
            model="ecif-tiny",
            pretrained=weights,
            batch_size=8,
            fit=True,
            device="cpu",
            num_workers=0,
        )
        found.append(train.values("ecif_influence"))
    copy.delete()
    assert found[0] == found[1]  # bit for bit on one machine
    # Features are float32, so BLAS libraries differ by about 1e-6 of them; that moves a score by up to 2e-4 of itself.
    np.testing.assert_allclose(found[0], GOLDEN, rtol=2e-3, atol=1e-6)
