"""The command line: results on stdout, one-line errors, exit codes."""

import importlib.util
import json
import math

import fiftyone as fo
import pytest
from click.testing import CliRunner

from fiftyone_ecif import trace
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import demo
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.store.files import cache_folder


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def named(dataset, made):
    return dataset.name, ["--model", "ecif-digits", "--pretrained", made[1], "--batch-size", 24]


def test_score_tag_export(dataset, named, tmp_path):
    name, model = named
    ran = invoke("score", name, "--tag", "train", "--target-tag", "val", *model, "--fit", "--json")
    assert ran.exit_code == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["scored"], result["skipped"], result["key"]) == (72, {}, "ecif")
    dataset.reload()
    assert dataset.count("ecif_influence") == 72

    ran = invoke("tag", name, "--count", 7, "--json")
    assert json.loads(ran.stdout) == {"dataset": name, "tag": "harmful", "tagged": 7}
    path = tmp_path / "harmful.csv"
    ran = invoke("export", name, path, "--tag", "harmful")
    assert ran.stdout == f"Exported 7 pairs to {path}\n"
    assert len(path.read_text().splitlines()) == 8


def test_score_passes_its_options_on(dataset, named):
    name, model = named
    options = ["--scope", "heads+logit_scale", "--role", "taylor", "--solver", "ggn", "--damping", 0.5]
    options += ["--target-loss", "zero_shot", "--label-field", "caption", "--template", "{}", "--template", "a {}"]
    options += ["--partitions", 2, "--score", "self_influence", "--score", "relative_influence", "--keep-gradients"]
    ran = invoke("score", name, "--tag", "train", "--target-tag", "val", *model, "--fit", *options, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["diagnostics"]["damping"] == 0.5
    dataset.reload()
    config = dataset.get_brain_info("ecif").config
    assert (config.scope, config.role, config.solver, config.damping) == ("heads+logit_scale", "taylor", "ggn", 0.5)
    assert (config.target_loss, config.label_field, config.templates) == ("zero_shot", "caption", ("{}", "a {}"))
    assert (config.n_partitions, config.keep_gradients) == (2, True)
    assert config.scores == ("self_influence", "relative_influence")
    assert dataset.count("ecif_error") == dataset.count("ecif_self_influence") == 72


def test_score_leaves_the_defaults_to_the_library(dataset, named):
    name, model = named
    ran = invoke("score", name, "--tag", "train", "--target-tag", "val", *model, "--fit")
    assert ran.exit_code == 0, ran.stderr
    dataset.reload()
    config = dataset.get_brain_info("ecif").config
    default = InfluenceSettings(model="ecif-digits")
    for setting in ("scope", "role", "solver", "damping", "target_loss", "templates", "n_partitions", "scores"):
        assert getattr(config, setting) == getattr(default, setting)
    assert config.keep_gradients


def test_misalignment_and_review(dataset, named):
    name, model = named
    train = dataset.match_tags("train")
    ran = invoke("misalignment", name, "--tag", "train", *model, "--trained", "--mark", "suspect", "--json")
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["scored"], found["skipped"], found["key"]) == (72, {}, "audit")
    rate = NoiseRate(**found["noise_rate"])
    assert 0 <= rate.low <= rate.high <= 1
    expected = math.ceil(rate.rate * 72) if rate.told else 0
    assert found["tagged"] == len(dataset.match_tags("suspect")) == expected
    assert set(found["diagnostics"]["power"]) == {"random", "similar", "subtle"}
    dataset.reload()
    assert train.count("audit_misalignment") == dataset.count("audit_misalignment") == 72
    assert dataset.get_brain_info("audit").config.fit

    ran = invoke("review", name, "--count", 3)
    assert ran.exit_code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "Tagged so far: 0 aligned, 0 misaligned."
    assert "run this again" in lines[1]
    proposed = dataset[lines[4].split()[1]]
    assert lines[4].endswith(proposed.caption)
    assert lines[4].split()[0] == f"{proposed.audit_misalignment:.3f}"
    assert len(lines) == 7

    train.exists("spoiled", False).limit(10).tag_samples("aligned")
    train.exists("spoiled").limit(5).tag_samples("misaligned")
    ran = invoke("review", name, "--count", 3, "--json")
    assert ran.exit_code == 0, ran.stderr
    learned = json.loads(ran.stdout)
    assert (learned["aligned"], learned["misaligned"], len(learned["proposals"])) == (10, 5, 3)
    assert 0 <= learned["auroc_low"] <= learned["auroc"] <= learned["auroc_high"] <= 1
    dataset.reload()
    assert learned["expected"] == pytest.approx(dataset.sum("audit_misalignment"))
    for one in learned["proposals"]:
        sample = dataset[one["id"]]
        assert one["caption"] == sample.caption
        assert (one["misalignment"], one["reason"]) == (sample.audit_misalignment, sample.audit_reason)
        assert not {"aligned", "misaligned"} & set(sample.tags)
    again = invoke("review", name, "--count", 3).stdout.splitlines()
    assert again[1].startswith(f"AUROC {learned['auroc']:.3f} ({learned['auroc_low']:.3f} to ")

    ran = invoke("review", name, "--key", "gone")
    assert ran.exit_code == 1
    assert "has no misalignment run 'gone'. Runs: audit" in ran.stderr


def test_misalignment_passes_its_options_on(dataset, named):
    name, model = named
    dataset.save_view("some", dataset.match_tags("train").limit(48))
    options = ["--view", "some", "--key", "other", "--detector", "global_influence", "--target-tag", "val"]
    options += ["--no-fit", "--trained", "--proximal", 0.5, "--seed", 2, "--mark", "odd", "--threshold", 0.5]
    ran = invoke("misalignment", name, *model, *options)
    assert ran.exit_code == 0, ran.stderr
    dataset.reload()
    config = dataset.get_brain_info("other").config
    assert (config.detector, config.fit, config.trained) == ("global_influence", False, True)
    assert (config.proximal, config.seed, config.batch_size) == (0.5, 2, 24)
    scores = dataset.exists("other_misalignment").values("other_misalignment")
    assert len(scores) == 48
    above = sum(score > 0.5 for score in scores)
    assert ran.stdout.splitlines()[0] == f"Scored 48 pairs of {name!r}, skipped 0. Field: other_misalignment"
    assert ran.stdout.splitlines()[2].startswith("Known wrong captions are found at AUROC ")
    assert ran.stdout.splitlines()[3] == f"Tagged {above} pairs as 'odd'."
    assert len(dataset.match_tags("odd")) == above

    ran = invoke("misalignment", name, *model, "--key", "other")
    assert ran.exit_code == 1
    assert "is taken" in ran.stderr
    broken = dataset.match_tags("val").first()
    broken.caption = ""
    broken.save()
    ran = invoke("misalignment", name, *model, "--key", "other", "--no-fit", "--overwrite", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["skipped"] == {broken.id: "caption: empty"}
    assert json.loads(ran.stdout)["tagged"] is None
    ran = invoke("misalignment", name, *model, "--key", "strict", "--strict")
    assert ran.exit_code == 1
    assert "caption: empty" in ran.stderr


def test_trace(dataset, named, score):
    name, _ = named
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    results = score(train, val, fit=True)
    expected = trace(results, count=3)
    ran = invoke("trace", name, "--count", 3, "--json")
    assert ran.exit_code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [one["id"] for one in found] == [one.id for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == other.loss
        assert one["culprits"] == [culprit._asdict() for culprit in other.culprits]
        assert one["helpers"] == [helper._asdict() for helper in other.helpers]
        assert one["neighbours"] == [neighbour._asdict() for neighbour in other.neighbours]
        assert one["retrieved"] == [match._asdict() for match in other.retrieved] != []
    ran = invoke("trace", name, "--count", 3)
    lines = ran.stdout.splitlines()
    assert lines[0] == f"{expected[0].id}, loss {expected[0].loss:.3f}"
    assert lines[1].split() == ["Similarity", "Right", "one", "Retrieved", "instead"]
    first = expected[0].retrieved[0]
    figures = f"{first.similarity:.3f}", f"{first.right_similarity:.3f}"
    assert lines[2].split(maxsplit=4) == [*figures, first.kind, first.found, dataset[first.found].caption]
    place = 3 + len(expected[0].retrieved)
    worst = expected[0].culprits[0].id
    assert lines[place].split()[1] == worst
    assert lines[place].endswith(dataset[worst].caption)
    sides = "retrieved", "culprits", "helpers", "neighbours"
    assert len(lines) == sum(sum(len(getattr(one, side)) for side in sides) + 6 for one in expected) - 1
    ran = invoke("trace", name, "--count", 1, "--exact", "--json")
    assert ran.exit_code == 0, ran.stderr
    exact = json.loads(ran.stdout)
    assert [one["id"] for one in exact] == [one.id for one in expected]
    assert exact[0]["culprits"][0]["influence"] != found[0]["culprits"][0]["influence"]

    dataset.delete_samples([worst])
    ran = invoke("trace", name, "--count", 3)
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout.splitlines()[place].split()[1:] == [worst, "(deleted)"]


def test_edit(dataset, named, score, tmp_path):
    name, _ = named
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    score(train, val, fit=True)
    path = tmp_path / "edited.pt"
    train.sort_by("ecif_rank").limit(3).tag_samples("out")
    ran = invoke("edit", name, path, "--tag", "out", "--json")
    assert ran.exit_code == 0, ran.stderr
    edit = json.loads(ran.stdout)
    assert (edit["removed"], edit["checkpoint"]) == (3, str(path))
    assert edit["target_loss_after"] < edit["target_loss_before"]
    ran = invoke("edit", name, path, "--tag", "out")
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "There is a file" in ran.stderr
    dataset.save_view("bad", dataset.match_tags("out").limit(2))
    ran = invoke("edit", name, path, "--view", "bad", "--overwrite")
    assert f"Target loss {edit['target_loss_before']:.4f} before, " in ran.stdout

    for command in (["trace", name], ["edit", name, path, "--tag", "out", "--overwrite"]):
        ran = invoke(*command, "--key", "gone")
        assert ran.exit_code == 1
        assert "has no influence run 'gone'. Runs: ecif" in ran.stderr


def test_runs_and_the_cache_are_managed(dataset, named, score):
    name, _ = named
    assert invoke("runs", name).stdout == "No runs.\n"
    results = score(dataset.match_tags("train"), dataset.match_tags("val"))
    changed = dataset.match_tags("train").first()
    changed.caption = "another"
    changed.save()
    (run,) = json.loads(invoke("runs", name, "--json").stdout)["runs"]
    assert (run["key"], run["kind"], run["scored"], run["skipped"]) == ("ecif", "influence", 72, 0)
    assert run["stale"] == {"changed": 1, "deleted": 0, "unscored": 0}
    assert run["when"] == f"{dataset.get_brain_info('ecif').timestamp.isoformat()}Z"
    lines = invoke("runs", name).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:2] == ["ecif", "influence"]
    assert lines[1].endswith("ecif-digits   1 changed")
    assert invoke("runs", name, "ecif").stdout.startswith("**ecif**: influence by ecif-digits ")

    ran = invoke("rename-run", name, "ecif", "better", "--json")
    assert json.loads(ran.stdout) == {"dataset": name, "key": "better"}
    dataset.reload()
    assert dataset.list_brain_runs() == ["better"]
    assert dataset.count("better_rank") == 72
    for command in (["runs", name, "ecif"], ["rename-run", name, "ecif", "new"], ["delete-run", name, "ecif"]):
        ran = invoke(*command)
        assert (ran.exit_code, ran.stdout) == (1, "")
        assert "has no run 'ecif'. Runs: better" in ran.stderr

    clone = dataset.clone()
    score(clone.match_tags("val"), clone.match_tags("train"), brain_key="own")
    before = json.loads(invoke("cache", "--json").stdout)
    orphan = cache_folder() / "format-1" / str(clone._doc.id)
    clone.delete()
    found = json.loads(invoke("cache", "--json").stdout)
    assert found["bytes"] == before["bytes"]
    assert found["unused"] == before["unused"] + sum(path.stat().st_size for path in orphan.rglob("*.*"))
    assert invoke("cache").stdout.startswith(f"{cache_folder()}: ")
    assert orphan.exists()
    ran = invoke("cache", "--free", "--json")
    expected = {"bytes": found["bytes"] - found["unused"], "unused": 0, "freed": found["unused"]}
    assert json.loads(ran.stdout) == {"folder": str(cache_folder()), **expected}
    assert not orphan.exists()
    assert len(results.clip_score()) == 72

    ran = invoke("delete-run", name, "better")
    fields = "better_influence, better_positive, better_negative, better_rank"
    assert ran.stdout.startswith(f"Deleted the run 'better' of {name!r}, with the fields {fields} and ")
    dataset.reload()
    assert dataset.list_brain_runs() == []
    assert not dataset.has_sample_field("better_rank")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["score", "nowhere", "--target-tag", "val"], 1, "There is no dataset 'nowhere'"),
        (["score", "nowhere"], 2, "--target-tag or --target-view"),
        (["score"], 2, "Missing argument 'DATASET'"),
        (["tag", "nowhere", "--direction", "sideways"], 2, "sideways"),
        (["export", "nowhere", "x.csv"], 1, "There is no dataset 'nowhere'"),
        (["trace", "nowhere"], 1, "There is no dataset 'nowhere'"),
        (["edit", "nowhere", "x.pt", "--tag", "out"], 1, "There is no dataset 'nowhere'"),
        (["edit", "nowhere", "x.pt"], 2, "--tag or --view"),
        (["score", "nowhere", "--target-tag", "val", "--role", "both"], 2, "both"),
        (["score", "nowhere", "--target-tag", "val", "--solver", "lu"], 2, "lu"),
        (["misalignment", "nowhere"], 1, "There is no dataset 'nowhere'"),
        (["misalignment", "nowhere", "--detector", "astrology"], 2, "astrology"),
        (["review", "nowhere"], 1, "There is no dataset 'nowhere'"),
        (["runs", "nowhere"], 1, "There is no dataset 'nowhere'"),
        (["delete-run", "nowhere"], 2, "Missing argument 'KEY'"),
        (["demo", "--pairs", "3", "--no-app"], 1, "at least 8 pairs"),
    ],
)
def test_errors_are_one_line(args, code, message):
    ran = invoke(*args)
    assert ran.exit_code == code
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_slice_of_grouped_data(grouped, made, tmp_path):
    name, model = grouped.name, ["--model", "ecif-digits", "--pretrained", made[1], "--batch-size", 24]
    on = ["--slice", "right", "--tag", "train"]
    ran = invoke("score", name, *on, "--target-tag", "val", *model, "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["scored"] == 72
    ran = invoke("misalignment", name, *on, *model, "--json")
    assert ran.exit_code == 0, ran.stderr
    grouped.reload()
    right = grouped.select_group_slices("right")
    assert right.count("ecif_influence") == right.count("audit_misalignment") == 72
    assert grouped.select_group_slices("left").count("ecif_influence") == 0
    ran = invoke("export", name, tmp_path / "pairs.csv", *on)
    assert ran.stdout.startswith("Exported 72 pairs")
    assert json.loads(invoke("tag", name, "--slice", "right", "--count", 2, "--json").stdout)["tagged"] == 2
    ran = invoke("score", name, "--slice", "middle", "--target-tag", "val", *model)
    assert ran.exit_code == 1
    assert ran.stderr == f"Error: {name!r} has no slice 'middle'. Slices: left, right\n"


def test_a_saved_view_that_does_not_exist(named):
    ran = invoke("score", named[0], "--view", "gone", "--target-tag", "val", *named[1])
    assert ran.exit_code == 1
    assert "no saved view 'gone'" in ran.stderr


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("demo", "score", "fit", "misalignment", "review", "trace", "edit", "tag", "export")),
        *([name] for name in ("runs", "rename-run", "delete-run", "cache")),
        ["doctor"],
        ["plugin", "install"],
    ],
)
def test_every_command_has_help(command):
    ran = invoke(*command, "--help")
    assert ran.exit_code == 0
    assert len(ran.stdout.splitlines()) > 4


def test_doctor_and_plugin_install_know_this_machine():
    checks = {check["name"]: check for check in json.loads(invoke("doctor", "--json").stdout)["checks"]}
    assert checks["database"]["ok"]
    assert checks["plugin"]["ok"]
    assert checks["cache"]["ok"]
    installed = importlib.util.find_spec("transformers") is not None
    assert (checks["transformers"]["ok"], checks["transformers"]["required"]) == (installed, False)
    assert installed or "pip install 'fiftyone-ecif[transformers]'" in checks["transformers"]["found"]
    ran = invoke("plugin", "install", "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["plugin"].endswith("@ecif/fiftyone-ecif")


def test_the_demo_passes_its_options_on(monkeypatch):
    given = []
    monkeypatch.setattr(demo, "run_demo", lambda *values: given.append(values) or {"dataset": demo.DATASET})
    ran = invoke("demo", "--pairs", 96, "--noise", 0.25, "--seed", 3, "--no-app", "--json")
    assert json.loads(ran.stdout) == {"dataset": demo.DATASET}
    assert given == [(96, 0.25, 3)]


def test_the_demo_leaves_a_dataset_of_the_users_alone():
    mine = fo.Dataset(demo.DATASET)
    ran = invoke("demo", "--no-app")
    assert ran.exit_code == 1
    assert "not the demo's" in ran.stderr
    mine.delete()
