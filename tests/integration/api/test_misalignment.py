"""Finding misaligned pairs on a real FiftyOne dataset: fields, runs, tags, cache and bad input."""

import logging

import fiftyone as fo
import numpy as np
import pytest

from fiftyone_ecif import EcifError
from fiftyone_ecif.api.misalignment import compute_misalignment, tag_misaligned
from fiftyone_ecif.demo import training
from fiftyone_ecif.influence import fitting
from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.misalignment.evidence import KINDS, WORDS
from fiftyone_ecif.misalignment.judgement import judge
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.runs.diagnostics import diagnose
from fiftyone_ecif.runs.misalignment import Misalignment, MisalignmentResults
from fiftyone_ecif.store.tables import Store

TRAINED = [name for name, detector in DETECTORS.items() if detector.needs_training]
FIELDS = {"misalignment": fo.FloatField, "reason": fo.StringField, "duplicate": fo.StringField}


@pytest.fixture
def audit(made):
    """``compute_misalignment`` with the small model, one cheap detector and quiet defaults."""

    def run(samples, **options):
        defaults = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0, "batch_size": 24}
        return compute_misalignment(samples, **(defaults | {"detector": "lemon_z", "progress": False} | options))

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Loading the model is an error of another kind."""

    def fail(self, *arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OpenClipEncoder, "__init__", fail)


@pytest.fixture
def encoded(monkeypatch):
    counts = {"image": 0, "text": 0}
    original = OpenClipEncoder.features

    def spy(self, tower, inputs):
        counts[tower] += len(inputs)
        return original(self, tower, inputs)

    monkeypatch.setattr(OpenClipEncoder, "features", spy)
    return counts


def train_of(dataset):
    return dataset.match_tags("train")


def state(dataset):
    return set(dataset.get_field_schema()), dataset.list_brain_runs(), dataset.count_sample_tags()


def stored(results):
    """Where the run's tables lie, and those of its detectors."""
    store = Store(*results.config.store)
    return store.folder, store.table(results.config.table).folder


def reloaded(dataset, key="audit"):
    """The results as another process would load them."""
    return dataset.load_brain_results(key, cache=False)


def test_everything_with_the_defaults(dataset, audit):
    train = train_of(dataset)
    results = audit(train, detector="calibrated", tag="look", share=0.1)
    assert isinstance(results, MisalignmentResults)
    assert results.ids == sorted(train.values("id"))
    for name, kind in FIELDS.items():
        field = dataset.get_field(f"audit_{name}")
        assert type(field) is kind
        assert field.description
        assert dataset.match_tags("val").values(f"audit_{name}") == [None] * 24
    assert "audit_misalignment" in {index.split(".")[0] for index in dataset.list_indexes()}
    scores = dict(zip(*train.values(["id", "audit_misalignment"]), strict=True))
    judgement = judge(results.evidence())
    np.testing.assert_allclose([scores[sample] for sample in results.ids], judgement.probability, rtol=1e-6)
    assert dataset.get_field("audit_misalignment").description.startswith("Probability that")
    written = {part for reason in train.values("audit_reason") if reason for part in reason.split(", ")}
    assert written
    assert written <= set(WORDS.values())
    assert None in train.values("audit_reason")
    assert train.values("audit_duplicate") == [None] * 72

    assert set(results.diagnostics) == {
        *("pairs", "noise_rate", "power", "seen", "signals", "weights", "detectors", "duplicates"),
        *("tagged", "model_notes", "computed_on"),
    }
    assert results.diagnostics["detectors"] == ["calibrated"]
    assert set(results.diagnostics["power"]) == set(KINDS)
    assert results.noise_rate == pytest.approx(judgement.rate)
    assert results.diagnostics["tagged"] == 8 == dataset.count_sample_tags()["look"]
    assert min(dataset.match_tags("look").values("audit_misalignment")) >= np.sort(judgement.probability)[-8]

    assert dataset.list_brain_runs(type="misalignment", method="ecif") == ["audit"]
    again = reloaded(dataset)
    assert again is not results
    assert (again.ids, again.diagnostics, again.skipped) == (results.ids, results.diagnostics, {})
    assert isinstance(dataset.get_brain_info("audit").config.build(), Misalignment)


def test_how_far_to_trust_it_is_logged(dataset, audit, caplog):
    with caplog.at_level(logging.INFO):
        results = audit(train_of(dataset), detector="calibrated", tag="look")
    power = results.diagnostics["power"]
    assert f"Of known wrong captions: random {power['random']:.2f}" in caplog.text
    assert ("hardly found" in caplog.text) == (power["random"] < 0.7)
    assert str(results.noise_rate) in caplog.text
    told = results.noise_rate.told
    assert ("Nothing was tagged" in caplog.text) != told
    assert results.diagnostics["tagged"] == (np.ceil(72 * results.noise_rate.rate) if told else 0)


def test_any_other_detector_gives_ranks(dataset, audit):
    results = audit(train_of(dataset), detector="clip_score")
    found = np.array(train_of(dataset).sort_by("id").values("audit_misalignment"))
    np.testing.assert_allclose(np.sort(found), np.arange(1, 73) / 72)
    assert "detector clip_score" in dataset.get_field("audit_misalignment").description
    assert results.diagnostics["detectors"] == ["calibrated", "clip_score"]
    assert results.noise_rate.high > 0


def test_the_same_seed_gives_the_same_and_reads_what_is_cached(dataset, audit, encoded):
    train = train_of(dataset)
    first = audit(train, detector="calibrated")
    assert encoded == {"image": 72, "text": 72}
    again = audit(train, detector="calibrated", brain_key="again")
    assert encoded == {"image": 72, "text": 72}
    assert again.diagnostics == first.diagnostics
    for field in FIELDS:
        assert train.values(f"audit_{field}") == train.values(f"again_{field}")
    audit(train, detector="calibrated", brain_key="other", seed=1)
    assert train.values("audit_misalignment") != train.values("other_misalignment")


def test_the_order_of_a_view_does_not_matter(dataset, audit):
    train = train_of(dataset)
    audit(train)
    before = train.values("audit_misalignment")
    audit(train.shuffle(seed=5), brain_key="shuffled")
    assert train.values("shuffled_misalignment") == before


def test_samples_that_are_no_pair_have_no_value(dataset, audit, tmp_path, caplog):
    empty, gone = train_of(dataset).limit(2)
    empty.caption, gone.filepath = "", str(tmp_path / "gone.png")
    empty.save()
    gone.save()
    with caplog.at_level(logging.WARNING):
        results = audit(train_of(dataset))
    assert set(results.skipped) == {empty.id, gone.id}
    assert "Skipped 2 training samples" in caplog.text
    for field in FIELDS:
        assert dataset[empty.id][f"audit_{field}"] is None
    assert dataset.count("audit_misalignment") == 70
    with pytest.raises(EcifError, match="skip_failures"):
        audit(train_of(dataset), skip_failures=False, brain_key="strict")


def test_any_script_and_duplicates_are_pairs(dataset, audit):
    train = train_of(dataset)
    captions, paths = train.values("caption"), train.values("filepath")
    captions[:4] = ["紅い七", "ünï 🐶", "🐱", "سبعة"]
    captions[5], paths[5] = captions[4].upper() + "!", paths[4]
    paths[7] = paths[6]
    train.set_values("caption", captions)
    train.set_values("filepath", paths)
    results = audit(train, detector="calibrated")
    assert train.values("audit_duplicate")[:9] == [None] * 4 + ["pair", "pair", "image", "image", None]
    assert results.diagnostics["duplicates"] == {"pair": 2, "image": 2, "caption": 2}
    assert np.isfinite(train.values("audit_misalignment")).all()


def test_that_the_model_was_trained_on_the_pairs_can_be_said(dataset, audit):
    results = audit(train_of(dataset), detector="neighbour_influence", fit=False, trained=True)
    assert results.diagnostics["seen"] is True
    assert not any(name.startswith("loaded:") for name in results.diagnostics["weights"])
    assert "neighbour_influence" in results.diagnostics["detectors"]


@pytest.mark.parametrize("detector", TRAINED)
def test_influence_needs_a_model_that_was_trained(detector, dataset, audit, no_model):
    target = dataset.match_tags("val") if detector == "global_influence" else None
    before = state(dataset)
    with pytest.raises(EcifError, match="Set fit=True, or trained=True"):
        audit(train_of(dataset), detector=detector, fit=False, target=target)
    assert state(dataset) == before


BAD = {
    "no such detector": ({"detector": "magic"}, "detector='magic' is not available"),
    "global influence on nothing": ({"detector": "global_influence"}, "belong together"),
    "share and threshold": ({"tag": "x", "share": 0.1, "threshold": 0.5}, "not both"),
    "a share without a tag": ({"share": 0.1}, "give tag too"),
    "a threshold without a tag": ({"threshold": 0.1}, "give tag too"),
    "a share above one": ({"tag": "x", "share": 1.5}, "share=1.5"),
    "a share of nothing": ({"tag": "x", "share": 0.0}, "share=0 would tag nothing"),
    "a share that is none": ({"tag": "x", "share": float("nan")}, "share=nan"),
    "a threshold below zero": ({"tag": "x", "threshold": -0.1}, "threshold=-0.1"),
    "a key that is no name": ({"brain_key": "my key"}, "not a name"),
    "a batch of one": ({"batch_size": 1}, "no negatives"),
    "a batch larger than the dataset": ({"batch_size": 73}, "batch_size=73 is larger"),
    "no such caption field": ({"caption_field": "captoin"}, "no field 'captoin'"),
    "a pull of zero": ({"proximal": 0}, "positive number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_any_work(case, dataset, audit, no_model):
    options, message = BAD[case]
    before = state(dataset)
    with pytest.raises(EcifError, match=message):
        audit(train_of(dataset), **options)
    assert state(dataset) == before


def test_tags_that_cannot_be_written_are_refused_before_work(dataset, audit, no_model):
    field = dataset.get_field("tags")
    field.read_only = True
    field.save()
    with pytest.raises(EcifError, match="'tags' is read-only"):
        audit(train_of(dataset), tag="suspect")


def test_a_target_is_for_global_influence_only(dataset, audit, no_model):
    with pytest.raises(EcifError, match="belong together"):
        audit(train_of(dataset), target=dataset.match_tags("val"))


def test_global_influence_is_what_compute_influence_finds(dataset, audit, score):
    train, val = train_of(dataset), dataset.match_tags("val")
    results = audit(train, detector="global_influence", target=val)
    score(train, val, fit=True)
    influence = dict(zip(*train.values(["id", "ecif_influence"]), strict=True))
    assert set(influence) == set(results.ids)
    ordered = train.sort_by("ecif_influence").values("id")
    assert train.sort_by("audit_misalignment", reverse=True).values("id") == ordered


def test_tags_by_share_threshold_and_estimate(dataset, audit):
    train = train_of(dataset)
    results = audit(train, tag="share", share=0.1)
    ordered = train.sort_by("audit_misalignment", reverse=True).values("id")
    assert set(dataset.match_tags("share").values("id")) == set(ordered[:8])
    assert results.diagnostics["tagged"] == reloaded(dataset).diagnostics["tagged"] == 8
    assert tag_misaligned(results, "threshold", threshold=0.75) == 18
    assert set(dataset.match_tags("threshold").values("id")) == set(ordered[:18])
    assert tag_misaligned(results, "none", threshold=1.0) == 0
    results.diagnostics["noise_rate"] = [0.2, 0.0, 0.5]
    with pytest.raises(EcifError, match=r"cannot be told: 0% to 50% may be\. Give share or threshold"):
        tag_misaligned(results, "unknown")
    for rate, count in ((0.5, 36), (0.011, 1), (0.0, 0)):
        results.diagnostics["noise_rate"] = list(NoiseRate(rate, rate, rate))
        assert tag_misaligned(results, f"rate{count}") == count
        assert dataset.count_sample_tags().get(f"rate{count}", 0) == count
    for limits in ({"share": 2}, {"share": 0.0}, {"share": 0.1, "threshold": 0.1}):
        with pytest.raises(EcifError):
            tag_misaligned(results, "bad", **limits)
    assert "bad" not in dataset.count_sample_tags()


def test_a_taken_key_and_overwriting(dataset, audit):
    train = train_of(dataset)
    audit(train.limit(30), detector="clip_score")
    before = train.values("audit_misalignment")
    with pytest.raises(EcifError, match="'audit' is taken"):
        audit(train)
    assert train.values("audit_misalignment") == before
    old = dataset.load_brain_results("audit")
    results = audit(train.skip(40), overwrite=True)
    assert set(dataset.exists("audit_misalignment").values("id")) == set(results.ids)
    assert dataset.load_brain_results("audit") is results
    assert "detector lemon_z" in dataset.get_field("audit_misalignment").description
    assert not stored(old)[0].exists()
    assert stored(results)[1].exists()
    with pytest.raises(EcifError, match="is gone"):
        old.evidence()


def test_a_field_of_the_users_is_left_alone(dataset, audit, no_model):
    dataset.add_sample_field("audit_reason", fo.StringField)
    with pytest.raises(EcifError, match="field 'audit_reason' already"):
        audit(train_of(dataset))


def test_keys_of_the_other_kind_of_run_are_refused(dataset, audit, score):
    train, val = train_of(dataset), dataset.match_tags("val")
    score(train, val)
    audit(train)
    before = state(dataset)
    with pytest.raises(EcifError, match="another kind of run"):
        audit(train, brain_key="ecif", overwrite=True)
    with pytest.raises(EcifError, match="another kind of run"):
        score(train, val, brain_key="audit", overwrite=True)
    assert state(dataset) == before


def test_renaming_and_deleting(dataset, audit):
    results = audit(train_of(dataset))
    values = dataset.values("audit_misalignment")
    dataset.rename_brain_run("audit", "better")
    assert dataset.values("better_misalignment") == values
    assert not dataset.has_sample_field("audit_misalignment")
    assert reloaded(dataset, "better").evidence().names == tuple(results.diagnostics["signals"])
    results = audit(train_of(dataset), detector="clip_score", brain_key="better", overwrite=True)
    assert "detector clip_score" in dataset.get_field("better_misalignment").description
    folder = stored(results)[0]
    assert folder.exists()
    dataset.delete_brain_run("better")
    assert not [field for field in dataset.get_field_schema() if field.startswith(("audit", "better"))]
    assert not folder.exists()
    assert dataset.list_brain_runs() == []


@pytest.mark.parametrize("first", ["audit", "ecif"])
def test_tables_that_two_runs_share_go_with_the_last_of_them(first, dataset, audit, score):
    train, val = train_of(dataset), dataset.match_tags("val")
    results = audit(train)
    influence = score(train, val, fit=True)
    assert results.config.store == influence.config.store
    dataset.delete_brain_run(first)
    if first == "ecif":
        assert len(results.evidence().pairs) == 72
    else:
        assert len(influence.clip_score()) == 72
    assert stored(results)[0].exists()
    dataset.delete_brain_run("ecif" if first == "audit" else "audit")
    assert not stored(results)[0].exists()


def test_a_fit_that_reaches_no_minimum_does_not_stop_detection(dataset, audit, caplog, monkeypatch):
    minimise = fitting.minimise
    monkeypatch.setattr(fitting, "minimise", lambda objective, tolerance, *_: minimise(objective, tolerance, 4))
    with caplog.at_level(logging.WARNING):
        results = audit(train_of(dataset), detector="self_influence", fit=True)
    assert "The fit reached no minimum of these pairs' loss" in caplog.text
    assert results.diagnostics["relative_gradient_norm"] > 1e-3
    assert np.isfinite(train_of(dataset).values("audit_misalignment")).all()
    assert any("reached no minimum" in remark.text for remark in diagnose(results.config, results.diagnostics))
    monkeypatch.undo()
    caplog.clear()
    better = audit(train_of(dataset), detector="self_influence", fit=True, proximal=10.0, overwrite=True)
    assert "The fit reached" not in caplog.text
    assert better.diagnostics["relative_gradient_norm"] <= 1e-5
