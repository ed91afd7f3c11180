"""The options of ``compute_influence``: what each changes, writes and refuses."""

import re
from functools import partial

import fiftyone as fo
import numpy as np
import pytest
import torch

from fiftyone_ecif import EcifError
from fiftyone_ecif.api import preparation
from fiftyone_ecif.influence import scoring
from fiftyone_ecif.influence.losses import SigmoidLoss
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.runs.influence import InfluenceConfig

HEADS = "text_projection|visual.attnpool.c_proj"


@pytest.fixture
def train(dataset):
    return dataset.match_tags("train")


@pytest.fixture
def val(dataset):
    """The target, with the colour that a caption names first as its class."""
    view = dataset.match_tags("val")
    colours = [re.search(r"red|green|blue|yellow|orange|purple|pink|white", text) for text in view.values("caption")]
    colours = [found[0] if found else "other" for found in colours]
    assert len(set(colours)) > 1
    dataset.add_sample_field("colour", fo.StringField)
    view.set_values("colour", colours)
    view.set_values("truth", [fo.Classification(label=colour) for colour in colours])
    return view


def fields_of(dataset, key="ecif"):
    return {name for name in dataset.get_field_schema() if name.startswith(f"{key}_")}


PLAIN = {"ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank"}


def test_zero_shot_classes_are_strings_or_classifications(train, val, score):
    options = {"target_loss": "zero_shot", "fit": True}
    first = score(train, val, label_field="colour", **options)
    score(train, val, label_field="truth", brain_key="nested", **options)
    templates = ("a {} number", "something {}")
    other = score(train, val, label_field="truth", templates=templates, brain_key="other", **options)
    influence = train.values("ecif_influence")
    assert np.ptp(influence) > 0
    assert train.values("nested_influence") == influence
    assert not np.allclose(train.values("other_influence"), influence, rtol=0.01)
    assert first.diagnostics["target_loss"] != other.diagnostics["target_loss"]
    target = first.target_pairs()
    assert np.isclose(target.losses.mean(), first.diagnostics["target_loss"])


def test_what_cannot_be_is_said_before_the_model_is_loaded(train, val, score, monkeypatch):
    val.set_field("colour", "red").save("colour")
    monkeypatch.setattr(preparation, "load_encoder", None)
    with pytest.raises(EcifError, match="The target has one class only, 'red'"):
        score(train, val, target_loss="zero_shot", label_field="colour")


def test_a_role_that_the_loss_has_not_is_said_before_anything_is_encoded(train, val, score, monkeypatch):
    monkeypatch.setattr(
        OpenClipEncoder, "loss", property(lambda self: SigmoidLoss(), lambda self, loss: None), raising=False
    )
    monkeypatch.setattr(preparation, "cached_features", None)
    with pytest.raises(EcifError, match="formula for the softmax loss"):
        score(train, val, role="as_printed")


def test_the_training_loss_is_the_mean_over_the_scored_pairs(train, score):
    """Without the pull to the loaded weights; the target is the same pairs in the same batches."""
    found = score(train, train, fit=True, proximal=0.01).diagnostics
    assert found["training_loss"] == pytest.approx(found["target_loss"], rel=1e-9)


def test_a_function_of_ones_own_is_measured(train, val, score):
    """The retrieval margin by name, and written out again."""

    def margin(images, captions, logits):
        wrong = logits - 1e9 * torch.eye(len(logits), dtype=logits.dtype)
        return (wrong.amax(1) + wrong.amax(0)) / 2 - logits.diagonal()

    def both(factor):
        def loss(images, captions, logits):
            return factor * (images * captions).sum(1)

        return loss

    named = score(train, val, target_loss="retrieval_margin", fit=True)
    score(train, val, target_loss=margin, fit=True, brain_key="own")
    np.testing.assert_allclose(train.values("own_influence"), train.values("ecif_influence"), rtol=1e-6, atol=1e-12)
    assert "units of the target loss" in train._dataset.get_field("ecif_influence").description
    losses = named.target_pairs().losses
    assert (losses > 0).any()
    assert (losses < 0).any()
    assert (losses > 0)[~named.target_pairs().mistakes].sum() == 0

    ones = score(train, val, target_loss=both(1), fit=True, brain_key="once")
    twos = score(train, val, target_loss=both(2), fit=True, brain_key="twice")  # of the same name
    np.testing.assert_allclose(np.multiply(2, train.values("once_influence")), train.values("twice_influence"))
    np.testing.assert_allclose(2 * ones.target_pairs().gradients, twos.target_pairs().gradients)
    assert ones.diagnostics["cached_correlation"] > 0.9


def test_a_target_loss_of_the_wrong_shape_is_said(train, val, score):
    with pytest.raises(EcifError, match=r"returned shape \(\) for 24 pairs"):
        score(train, val, target_loss=lambda images, captions, logits: logits.mean())


def test_slices_get_a_field_each_and_their_mean(dataset, train, val, score):
    score(train, {"early": val.limit(10), "late": val.skip(10)}, fit=True)
    assert fields_of(dataset) == PLAIN | {"ecif_influence_on_early", "ecif_influence_on_late"}
    score(train, val.limit(10), fit=True, brain_key="early")
    each = [train.values(f"ecif_influence_on_{name}") for name in ("early", "late")]
    np.testing.assert_allclose(train.values("ecif_influence"), np.mean(each, axis=0))
    np.testing.assert_allclose(each[0], train.values("early_influence"))
    assert not np.allclose(each[0], each[1])


def test_slices_may_be_the_same(train, val, score):
    results = score(train, {"once": val, "again": val}, fit=True)
    assert train.values("ecif_influence_on_once") == train.values("ecif_influence_on_again")
    assert results.target_pairs("once").ids == results.target_pairs("again").ids


def test_partitions_are_averaged_with_their_error(dataset, train, val, score):
    score(train, val, fit=True, n_partitions=2, seed=5)
    for seed in (5, 6):
        score(train, val, fit=True, seed=seed, brain_key=f"seed{seed}")
    single = np.array([train.values(f"seed{seed}_influence") for seed in (5, 6)])
    np.testing.assert_allclose(train.values("ecif_influence"), single.mean(0))
    np.testing.assert_allclose(train.values("ecif_error"), np.abs(single[0] - single[1]) / 2)
    assert not dataset.has_sample_field("seed5_error")


def test_extra_scores(dataset, train, val, score):
    names = ["relative_influence", "self_influence", "leave_one_out_loss"]
    results = score(train, val, fit=True, scores=names)
    assert fields_of(dataset) == PLAIN | {f"ecif_{name}" for name in names}
    view = train.sort_by("id")
    relative, own, loss, influence = (view.values(f"ecif_{name}") for name in [*names, "influence"])
    np.testing.assert_allclose(relative, influence / results.cached().lengths)
    np.testing.assert_allclose(own, results.self_influence())
    np.testing.assert_allclose(loss, results.leave_one_out_loss())
    assert (np.array(loss) > own).all()  # the pair's own loss is positive


def test_roles(train, val, score):
    for role in ("exact", "positive", "negative", "taylor", "as_printed"):
        score(train, val, fit=True, role=role, brain_key=role)

    def column(role, part):
        return np.array(train.values(f"{role}_{part}"))

    np.testing.assert_allclose(column("exact", "influence"), column("exact", "positive") + column("exact", "negative"))
    for role, other in (("positive", "negative"), ("negative", "positive")):
        assert not column(role, other).any()
        np.testing.assert_allclose(column(role, role), column("exact", role))
        assert column(role, role).any()
    assert 0.9 < np.corrcoef(column("taylor", "influence"), column("exact", "influence"))[0, 1] < 1 - 1e-9
    assert not np.allclose(column("as_printed", "influence"), column("exact", "influence"), rtol=0.01)


ALWAYS = {"relative_gradient_norm", "smallest_norm", "training_loss", "target_loss", "pairs", "target_pairs"}
ALWAYS |= {"shared_pairs", "parameters", "attributed", "held_fixed", "model_notes", "computed_on"}
OF_A_SOLVE = {"damping", "solve_residual", "solve_iterations", "condition_number"}


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ("hessian", ALWAYS | OF_A_SOLVE | {"cached_correlation"}),
        ("ggn", ALWAYS | OF_A_SOLVE | {"cached_correlation"}),
        ("logra", ALWAYS),
        ("identity", ALWAYS | {"cached_correlation"}),
    ],
)
def test_solvers(train, val, score, solver, expected):
    results = score(train, val, fit=True, solver=solver)
    found = results.diagnostics
    assert set(found) == expected
    assert np.ptp(train.values("ecif_influence")) > 0
    assert (found["pairs"], found["target_pairs"], found["shared_pairs"]) == (72, 24, 0)
    assert found["relative_gradient_norm"] <= 1e-5
    assert 0 < found["smallest_norm"] <= 1
    assert found.get("cached_correlation", 1) > 0.8
    if "damping" in expected:
        assert found["damping"] == 0
        assert found["solve_residual"] <= 1e-6
        assert found["condition_number"] > 1
        assert found["solve_iterations"] > 1


def test_damping_shrinks_influence(train, val, score):
    score(train, val, fit=True)
    damped = score(train, val, fit=True, damping=2.0, brain_key="damped")
    assert damped.diagnostics["damping"] == 2
    spread = [np.std(train.values(f"{key}_influence")) for key in ("ecif", "damped")]
    assert spread[1] < spread[0]


def test_what_is_attributed_and_what_is_held_fixed(train, val, score, made):
    every = {name for name, _ in OpenClipEncoder("ecif-digits", made[1], "cpu").model.named_parameters()}
    heads = ["text_projection", "visual.attnpool.c_proj.bias", "visual.attnpool.c_proj.weight"]
    sizes = []
    for scope, expected in (("heads", heads), ("heads+logit_scale", ["logit_scale", *heads])):
        found = score(train, val, fit=True, scope=scope, overwrite=True).diagnostics
        assert sorted(found["attributed"]) == expected
        assert not set(found["attributed"]) & set(found["held_fixed"])
        assert {*found["attributed"], *found["held_fixed"]} == every
        sizes.append(found["parameters"])
    assert sizes[1] == sizes[0] + 1


def test_a_deep_scope_agrees_with_the_heads(train, val, score, monkeypatch):
    """The same parameters by name, through the whole model in float32, and from cached features in float64."""
    monkeypatch.setattr(scoring, "solve", partial(scoring.solve, tolerance=1e-5))
    heads = score(train, val, solver="ggn", proximal=1.0)
    deep = score(train, val, scope=HEADS, proximal=1.0, brain_key="deep")
    assert dict(deep.config.serialize())["solver"] == "ggn"
    assert sorted(deep.diagnostics["attributed"]) == sorted(heads.diagnostics["attributed"])
    expected = np.array(train.values("ecif_influence"))
    off = np.abs(np.array(train.values("deep_influence")) - expected).max() / np.abs(expected).max()
    assert off < 1e-3
    with pytest.raises(EcifError, match="kept no gradients"):
        deep.cached()


def test_a_plain_run_replaces_one_with_extra_fields(dataset, train, val, score):
    score(train, {"a": val}, fit=True, n_partitions=2, scores=["self_influence"])
    assert fields_of(dataset) == PLAIN | {"ecif_influence_on_a", "ecif_error", "ecif_self_influence"}
    score(train, val, fit=True, target_loss="retrieval_margin", overwrite=True)
    assert fields_of(dataset) == PLAIN
    assert "units of the target loss" in dataset.get_field("ecif_influence").description
    dataset.delete_brain_run("ecif")
    assert fields_of(dataset) == set()


def test_all_fields_are_renamed_and_deleted(dataset, train, val, score):
    score(train, {"a": val}, fit=True, n_partitions=2, scores=["self_influence"])
    before = {name: train.values(name) for name in fields_of(dataset)}
    assert len(before) == 7
    dataset.rename_brain_run("ecif", "better")
    assert fields_of(dataset) == set()
    assert {name.replace("better", "ecif"): train.values(name) for name in fields_of(dataset, "better")} == before
    dataset.delete_brain_run("better")
    assert fields_of(dataset, "better") == set()


def test_a_field_of_the_users_is_not_overwritten(dataset, train, val, score):
    dataset.add_sample_field("ecif_influence_on_a", fo.FloatField)
    with pytest.raises(EcifError, match="'ecif_influence_on_a' already, which no run wrote"):
        score(train, {"a": val})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "both"}, "role='both' is not available. Use one of exact"),
        ({"solver": "lu"}, "solver='lu' is not available. Use one of hessian"),
        ({"damping": -0.1}, "damping=-0.1 must be a number from 0 up"),
        ({"n_partitions": 0}, "n_partitions=0 must be at least 1"),
        ({"label_field": "colour"}, "belong together"),
        ({"target_loss": "zero_shot"}, "belong together"),
        ({"target_loss": "accuracy"}, "target_loss='accuracy' is not available"),
        ({"target_loss": "zero_shot", "label_field": "color"}, "no field 'color'"),
        ({"scores": ["shapley"]}, "scores='shapley' is not available"),
        ({"scores": ["self_influence"], "keep_gradients": False}, "keep_gradients=False does not go with scores"),
        ({"solver": "logra", "keep_gradients": False}, "keep_gradients=False does not go with solver=logra"),
        ({"slices": ["hard cases"]}, "'hard cases' is not a name for a slice"),
        ({"slices": [7]}, "7 is not a name for a slice"),
        ({"slices": []}, "target is needed"),
        ({"target_loss": "zero_shot", "label_field": "colour", "templates": ["a photo"]}, "must hold {} for the class"),
        ({"scope": "lora:x"}, "scope='lora:x' is not known"),
        ({"scope": "("}, "no regular expression"),
    ],
)
def test_bad_options_are_refused_before_the_model_loads(dataset, train, val, score, monkeypatch, options, message):
    monkeypatch.setattr(OpenClipEncoder, "__init__", lambda *_: pytest.fail("the model was loaded"))
    options = {"target": val} | options
    if "slices" in options:
        options["target"] = dict.fromkeys(options.pop("slices"), val)
    with pytest.raises(EcifError, match=message):
        score(train, **options)
    assert fields_of(dataset) == set()
    assert dataset.list_brain_runs() == []


def test_a_run_of_an_own_function_is_known_but_not_repeated(train, val, score):
    def worst(images, captions, logits):
        return -logits.diagonal()

    score(train, val, target_loss=worst, fit=True, brain_key="own")
    dataset = train._dataset
    stored = dataset.get_brain_info("own").config
    assert stored.target_loss == "function worst"
    assert InfluenceConfig.from_dict(stored.serialize()).target_loss == stored.target_loss
    with pytest.raises(EcifError, match=r"function of your own \(function worst\)"):
        score(train, val, target_loss=stored.target_loss, fit=True, brain_key="again")
