"""Taking pairs out of a model, compared with learning without them."""

import numpy as np
import open_clip
import pytest
import torch

from fiftyone_ecif import EcifError, compute_influence, edit_model, group_influence, trace
from fiftyone_ecif.api.preparation import reopen
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.linear_solve import conjugate_gradient
from fiftyone_ecif.influence.newton_step import group_gradient, removal_step


@pytest.fixture(scope="module")
def run(made):
    """A fitted run and its most harmful pairs, which do not all share a batch."""
    dataset = made[0].clone()
    options = {"model": "ecif-digits", "pretrained": made[1], "num_workers": 0, "batch_size": 24, "fit": True}
    results = compute_influence(dataset.match_tags("train"), target=dataset.match_tags("val"), **options)
    yield results, dataset.sort_by("ecif_rank").exists("ecif_rank").limit(4).values("id"), options
    dataset.delete()


@pytest.fixture(scope="module")
def twin(run):
    """The prepared, its stationary point, and that of the objective without the harmful pairs, really refitted."""
    results, harmful, _ = run
    prepared, objective, theta = follow(reopen(results), progress=False)
    rows = torch.tensor([results.ids.index(sample) for sample in harmful])
    refitted = None
    for refitted, _ in minimise(objective.without(rows), 1e-8):  # noqa: B007
        pass
    return prepared, objective, theta, rows, refitted


def test_an_edited_model_is_measured_and_loads(run, twin, tmp_path):
    results, harmful, options = run
    prepared, _, theta, _, _ = twin
    path = tmp_path / "edited.pt"
    edit = edit_model(results, harmful, str(path))
    assert (edit.checkpoint, edit.removed) == (str(path), 4)
    assert edit.target_loss_after < edit.target_loss_before  # without harmful pairs
    change = edit.target_loss_after - edit.target_loss_before
    assert abs(edit.target_loss_predicted - edit.target_loss_after) < 0.2 * abs(change)
    assert 0 < edit.relative_change < 0.2
    assert edit.solve_residual <= 3e-2
    (target,) = prepared.targets.values()
    assert np.isclose(edit.target_loss_before, target.loss(theta).item())
    assert np.isclose(edit.mistakes_before, target.mistakes(theta).double().mean().item())

    model = open_clip.create_model("ecif-digits", pretrained=str(path))
    held = dict(open_clip.create_model("ecif-digits", pretrained=options["pretrained"]).named_parameters())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, held[name])}
    assert changed == set(results.diagnostics["attributed"])
    dataset = results.samples._dataset
    again = compute_influence(
        dataset.match_tags("train"),
        target=dataset.match_tags("val"),
        **options | {"pretrained": str(path), "fit": False, "solver": "identity", "brain_key": "edited"},
    )
    assert np.isclose(again.diagnostics["target_loss"], edit.target_loss_after, rtol=1e-5)


def test_a_newton_step_is_close_to_learning_without_the_pairs(run, twin):
    _, objective, theta, rows, refitted = twin
    steps = removal_step(objective, theta, rows, "hessian", tolerance=1e-6)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            change = end.value.vector
            break
    real = refitted - theta
    assert torch.cosine_similarity(change, real, dim=0) > 0.99
    assert 0.9 < change.norm() / real.norm() < 1.1


def test_the_groups_gradient_is_the_true_one(twin):
    _, objective, theta, rows, _ = twin
    expected = objective.gradient_and_value(theta)[0] - objective.without(rows).gradient_and_value(theta)[0]
    torch.testing.assert_close(group_gradient(objective, theta, rows), expected)


def test_group_influence_predicts_refitting(run, twin):
    results, harmful, _ = run
    prepared, _, theta, _, refitted = twin
    (target,) = prepared.targets.values()
    real = (target.loss(refitted) - target.loss(theta)).item()
    found = group_influence(results, harmful)
    assert found.influence < 0
    assert abs(found.influence - real) < 0.2 * abs(real)
    single = dict(zip(*results.samples._dataset.values(["id", "ecif_influence"]), strict=True))
    assert np.isclose(found.sum_of_pairs, sum(single[sample] for sample in harmful))
    view = results.samples._dataset.select(harmful)
    np.testing.assert_allclose(group_influence(results, view), found)
    np.testing.assert_allclose(group_influence(results, [*harmful, harmful[0]]), found)


def test_the_gradient_of_a_group_of_one_gives_the_pairs_influence(run, twin):
    """With the curvature of all pairs, which the Newton step replaces by that of the others."""
    results, harmful, _ = run
    prepared, objective, theta, rows, _ = twin
    (target,) = prepared.targets.values()
    right = target.gradient_and_value(theta)[0]
    *_, solution = conjugate_gradient(lambda v: objective.hessian_product(theta, v), right, 1e-8)
    expected = [results.samples._dataset[sample].ecif_influence for sample in harmful]
    found = [group_gradient(objective, theta, row[None]).dot(solution.vector).item() for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_renaming_the_dataset_changes_nothing(dataset, score):
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True)
    before = group_influence(results, results.ids[:3])
    name = dataset.name
    dataset.name = f"{name}-renamed"
    assert group_influence(results, results.ids[:3]) == before
    dataset.name = name


def test_what_cannot_be_removed_is_refused(run, tmp_path):
    results, harmful, _ = run
    taken = tmp_path / "taken.pt"
    taken.write_text("mine")
    out = str(tmp_path / "out.pt")
    outside = results.samples._dataset.match_tags("val").first().id
    for removed, path, message in (
        ([*harmful, outside], out, f"{outside} was not scored by run 'ecif'"),
        ([], out, "No pairs were given"),
        (results.ids[1:], out, "Removing 71 of 72 pairs leaves no pairs"),
        (harmful, str(taken), "There is a file"),
        (harmful, str(tmp_path), "is a folder"),
        (harmful, str(taken / "out.pt"), "cannot be written"),
    ):
        with pytest.raises(EcifError, match=message):
            edit_model(results, removed, path)
    assert taken.read_text() == "mine"
    assert not (tmp_path / "out.pt").exists()
    edit_model(results, harmful, str(taken), overwrite=True)
    assert open_clip.create_model("ecif-digits", pretrained=str(taken))


@pytest.mark.parametrize("tag", ["train", "val"])
def test_a_caption_that_changed_since_the_run_is_noticed(dataset, score, tmp_path, tag):
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True)
    sample = dataset.match_tags(tag).first()
    sample.caption = "a green nine above a red one"
    sample.save()
    with pytest.raises(EcifError, match="changed since"):
        edit_model(results, results.ids[:2], str(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


def test_a_target_that_is_gone_is_said(dataset, score, tmp_path):
    other = dataset.match_tags("val").clone()
    results = score(dataset.match_tags("train"), other, fit=True)
    edit_model(results, results.ids[:2], str(tmp_path / "out.pt"))
    name = other.name
    other.delete()
    edit_model(results, results.ids[:2], str(tmp_path / "same.pt"))  # the same samples are in the run's own dataset
    dataset.delete_samples(dataset.match_tags("val"))
    with pytest.raises(EcifError, match=f"in dataset '{name}', which is gone"):
        edit_model(results, results.ids[:2], str(tmp_path / "other.pt"))


def test_deleted_pairs_are_said(dataset, score, tmp_path):
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True, batch_size=72)
    dataset.delete_samples(results.ids[:3])
    for work in (
        lambda: edit_model(results, results.ids[:4], str(tmp_path / "out.pt")),
        lambda: group_influence(results, results.ids[5:6]),
        lambda: trace(results, limit=1, exact=True),
    ):
        with pytest.raises(EcifError, match=f"3 of the 72 pairs of run 'ecif' were deleted .*{results.ids[0]}. Score"):
            work()
    dataset.delete_samples(results.ids)
    with pytest.raises(EcifError, match="72 of the 72 pairs of run 'ecif' were deleted"):
        group_influence(results, results.ids[5:6])
    assert not (tmp_path / "out.pt").exists()
    assert trace(results, limit=1)  # stored gradients need no samples


@pytest.mark.parametrize("options", [{}, {"scope": "ln_final.*", "fit": False, "keep_gradients": True}])
def test_what_is_left_of_a_target_stands_for_it(options, dataset, score, tmp_path, caplog):
    """The step is that of the training pairs; only the losses are the target's."""
    val = dataset.match_tags("val")
    results = score(dataset.match_tags("train"), val, **({"fit": True} | options))
    whole = edit_model(results, results.ids[:2], str(tmp_path / "whole.pt"))
    queries = results.target_ids[""]
    dataset.delete_samples(queries[:3])
    part = edit_model(results, results.ids[:2], str(tmp_path / "part.pt"))
    assert "3 of the 24 target pairs of run 'ecif' were deleted since: losses are those of the others" in caplog.text
    assert part.relative_change == pytest.approx(whole.relative_change, rel=1e-6)
    assert part.target_loss_before != whole.target_loss_before
    weights = [torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "part.pt")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert np.isfinite(group_influence(results, results.ids[:2])).all()
    with pytest.raises(EcifError, match="3 of the 24 target pairs of run 'ecif' were deleted"):
        trace(results, queries[4:5], exact=True)
    dataset.delete_samples(queries[:23])
    with pytest.raises(EcifError, match="23 of the 24 target pairs of run 'ecif' were deleted"):
        group_influence(results, results.ids[:2])
