"""What forms offer, judge, remember and refuse."""

import shutil

import fiftyone as fo
import pytest
from operator_driver import operator, resolve, run_in_the_app

from fiftyone_ecif import EcifError, compute_misalignment


def test_forms_without_anything_to_work_on_are_blocked(made):
    dataset = fo.Dataset()
    dataset.add_sample(fo.Sample(filepath=made[0].first().filepath))
    assert resolve(dataset, "compute_influence", {})["no_captions"]["invalid"]
    assert resolve(dataset, "detect_misalignment", {})["no_captions"]["invalid"]
    assert "Detect misaligned pairs first" in resolve(dataset, "review_misalignment", {})["no_run"]["error_message"]
    assert resolve(dataset, "tag_by_influence", {})["no_scores"]["invalid"]
    assert resolve(dataset, "manage_influence_runs", {})["no_run"]["invalid"]
    assert resolve(dataset, "export_pairs", {})["no_captions"]["invalid"]
    dataset.delete()


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"device": "gpu"}, "device", "none that torch knows"),
        ({"device": "cuda:99"}, "device", "finds no"),
        ({"n_partitions": 0}, "n_partitions", "at least 1"),
        ({"batch_size": 97}, "batch_size", "There are 96 pairs. Use at most 96"),
        ({"pretrained": "/etc/passwd"}, "pretrained", "/etc/passwd is no checkpoint"),
        ({"pretrained": "/etc/"}, "pretrained", "The folder /etc holds no weights"),
        ({"pretrained": "~/none.pt"}, "pretrained", "There is no file HOME/none.pt"),
        ({"brain_key": "a key"}, "brain_key", "Key 'a key' is not a name"),
    ],
)
def test_what_the_form_can_judge_is_judged_there(dataset, monkeypatch, tmp_path, params, field, message):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = resolve(dataset, "compute_influence", {"advanced": True, "caption_field": "caption", **params})[field]
    assert found["invalid"]
    assert message.replace("HOME", str(tmp_path)) in found["error_message"]


def test_a_pasted_path_is_taken_as_it_is_meant(dataset, options, made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(made[1], tmp_path / "mine.pt")
    for text in (" ~/mine.pt ", f'"{tmp_path}/mine.pt"', "'~/mine.pt' "):
        assert not resolve(dataset, "compute_influence", {"pretrained": text})["pretrained"].get("invalid")
        operator("compute_influence")(
            dataset.match_tags("train"), **options | {"pretrained": text, "fit": False, "overwrite": True}
        )
        dataset.reload()
        assert dataset.get_brain_info("ecif").config.pretrained == str(tmp_path / "mine.pt")
    operator("export_pairs")(dataset, ' "~/pairs.csv"')
    assert (tmp_path / "pairs.csv").is_file()


def test_validation_pairs_are_left_out_of_what_is_scored(dataset, options):
    dataset.save_view("mine", dataset.match_tags("val"))
    for target in ("tag: val", "saved view: mine"):
        operator("compute_influence")(dataset, **options | {"target": target, "overwrite": True})
        assert dataset.match_tags("val").count("ecif_influence") == 0
        assert dataset.count("ecif_influence") == 72
    operator("compute_influence")(dataset, **options, leave_out=False, overwrite=True)
    assert dataset.count("ecif_influence") == 96
    form = resolve(dataset, "compute_influence", {"target": "tag: val"}, view=dataset.match_tags("val")._serialize())
    assert "All of these are validation pairs" in form["target"]["error_message"]


def test_a_share_can_be_held_out(dataset, options):
    dataset.untag_samples(["train", "val"])
    form = resolve(dataset, "compute_influence", {"target": "hold out", "held_out": 25.0})
    assert form["target"]["type"]["values"] == ["hold out"]
    assert form["target"]["default"] == "hold out"
    assert form["counts"]["view"]["label"] == "72 pairs will be scored towards 24 validation pairs"
    assert (
        "at least 2"
        in resolve(dataset, "compute_influence", {"target": "hold out", "held_out": 0.5})["target"]["error_message"]
    )
    drawn = []
    for seed in (0, 0, 1):
        operator("compute_influence")(
            dataset, **options | {"target": "hold out", "overwrite": True}, held_out=25.0, held_out_seed=seed
        )
        drawn.append(set(dataset.match_tags("held_out").values("id")))
        assert not set(dataset.exists("ecif_influence").values("id")) & drawn[-1]
    assert len(drawn[0]) == len(drawn[2]) == 24
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_form_starts_with_what_was_entered_last(dataset, options, detect):
    assert resolve(dataset, "compute_influence", {})["pretrained"]["default"] is None
    params = {**options, "caption_field": "spoiled", "target": "tag: train", "scope": "lora:4:99"}
    failed = dict(run_in_the_app(dataset, params))
    assert failed["notify"]["variant"] == "error"
    form = resolve(dataset, "compute_influence", {})
    kept = {name: form[name]["default"] for name in ("model", "pretrained", "caption_field", "target", "fit")}
    assert kept == {name: params[name] for name in kept}
    assert form["brain_key"]["default"] == "ecif"  # nothing was written under it
    assert resolve(dataset, "detect_misalignment", {})["pretrained"]["default"] == options["pretrained"]
    detect(fit=False)
    form = resolve(dataset, "detect_misalignment", {})
    assert (form["brain_key"]["default"], form["caption_field"]["default"]) == ("audit2", "caption")
    dataset.add_sample_field("ecif_rank", fo.StringField)
    assert resolve(dataset, "compute_influence", {})["brain_key"]["default"] == "ecif2"


def test_a_form_starts_with_the_run_where_that_is_newer(dataset, score):
    score(dataset.match_tags("train"), dataset.match_tags("val"), brain_key="direct")
    config = dataset.get_brain_info("direct").config
    form = resolve(dataset, "detect_misalignment", {})
    assert (form["model"]["default"], form["pretrained"]["default"]) == (config.model, config.pretrained)


def test_the_slice_that_the_app_shows_is_scored(grouped, options):
    params = {"caption_field": "caption", "target": "tag: val", "limit": "count", "count": 200}
    for slice_, pairs in (("right", 96), ("left", 96)):
        form = resolve(grouped, "detect_misalignment", params, group_slice=slice_)
        assert not form["caption_field"].get("invalid")
        assert form["counts"]["view"]["label"] == f"{pairs} pairs will be scored"
    form = resolve(grouped, "compute_influence", params, group_slice="right")
    assert form["counts"]["view"]["label"] == "72 pairs will be scored towards 24 validation pairs"
    told = run_in_the_app(grouped, {**options, **params}, group_slice="right")
    assert dict(told)["notify"]["variant"] == "success"
    right = grouped.select_group_slices("right")
    assert right.count("ecif_influence") == len(right.match_tags("train")) == 72
    assert grouped.select_group_slices("left").count("ecif_influence") == 0


def test_a_view_of_groups_is_taken_apart(dataset, options):
    view = dataset.match_tags("train").group_by("spoiled")
    form = resolve(dataset, "detect_misalignment", {"caption_field": "caption"}, view=view._serialize())
    assert form["counts"]["view"]["label"] == "72 pairs will be scored"
    with pytest.raises(EcifError, match=r"Use its samples: view.flatten\(\)"):
        compute_misalignment(view, model=options["model"], pretrained=options["pretrained"])
    compute_misalignment(view.flatten(), model=options["model"], pretrained=options["pretrained"], batch_size=24)


def test_captions_in_lists_get_advice_that_works(dataset, options):
    dataset.add_sample_field("captions", fo.ListField, subfield=fo.StringField)
    dataset.set_values("captions", [[text, "another"] for text in dataset.values("caption")])
    dataset.delete_sample_fields(["caption", "spoiled"])
    said = resolve(dataset, "compute_influence", {})["no_captions"]["error_message"]
    train = dataset.match_tags("train")
    with pytest.raises(EcifError, match="Captions must be in a string field, but 'captions' is a ListField") as failed:
        compute_misalignment(train, "captions", options["model"], options["pretrained"])
    advice = said.partition("Make one of the lists in 'captions': ")[2]
    assert advice
    assert str(failed.value).endswith(advice)
    exec(advice, {"dataset": dataset})
    compute_misalignment(train, model=options["model"], pretrained=options["pretrained"], batch_size=24)


def test_one_selected_pair_cannot_be_scored(dataset):
    one = [dataset.first().id]
    for name in ("compute_influence", "detect_misalignment"):
        form = resolve(dataset, name, {}, selected=one, view_target="SELECTED_SAMPLES")
        assert "at least 2 pairs, and 1 is selected" in form["one_pair"]["error_message"]


def test_the_fields_of_runs_are_no_captions_and_the_likely_one_is_chosen(dataset, detect):
    detect(fit=False)
    dataset.rename_sample_field("caption", "alt_words")
    dataset.add_sample_field("source", fo.StringField)
    form = resolve(dataset, "compute_influence", {})["caption_field"]
    assert sorted(form["type"]["values"]) == ["alt_words", "source", "spoiled"]
    assert form["default"] == "alt_words"  # the one with the longest texts
    dataset.rename_sample_field("alt_words", "Description")
    for name in ("compute_influence", "export_pairs"):
        assert resolve(dataset, name, {})["caption_field"]["default"] == "Description"
    form = resolve(dataset, "compute_influence", {"caption_field": "source"})
    assert form["empty"]["view"]["label"] == "Only 0 of 96 samples have a text in 'source'"
    assert "empty" not in resolve(dataset, "compute_influence", {"caption_field": "Description"})


def test_a_target_that_cannot_be_used_names_the_field(dataset, options):
    dataset.rename_sample_field("caption", "alt")
    dataset.match_tags("val").set_field("alt", None).save("alt")
    with pytest.raises(EcifError, match=r"The target cannot be used.*alt: empty"):
        operator("compute_influence")(dataset.match_tags("train"), **options, caption_field="alt")


def test_the_export_form_protects_a_file(dataset, tmp_path):
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    assert resolve(dataset, "export_pairs", {"path": str(taken)})["path"]["invalid"]
    assert not resolve(dataset, "export_pairs", {"path": str(taken), "overwrite": True})["path"]["invalid"]
    assert "Must end in .csv or .json" in resolve(dataset, "export_pairs", {"path": "/x.doc"})["path"]["error_message"]


def test_a_file_is_not_written_where_the_app_runs(dataset, options, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, ending in (("export_pairs", "csv"), ("edit_model", "pt")):
        if name == "edit_model":
            operator("compute_influence")(dataset.match_tags("train"), **options)
        form = resolve(dataset, name, {"path": f"mine.{ending}"})
        assert form["path"]["error_message"] == f"Give the whole path, such as {tmp_path}/mine.{ending}"
        assert not resolve(dataset, name, {"path": f"~/mine.{ending}"})["path"].get("invalid")
    monkeypatch.chdir(tmp_path)
    operator("export_pairs")(dataset, "mine.csv")  # from Python it is where one works
    assert (tmp_path / "mine.csv").is_file()
