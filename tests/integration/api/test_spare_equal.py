"""Equal pairs that are not each other's negatives, from the option to scores, traces, edits and fits."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fiftyone_ecif import edit_model, fit_model, group_influence, trace
from fiftyone_ecif.api.preparation import reopen
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.influence.fitting import minimise
from fiftyone_ecif.influence.newton_step import removal_step
from fiftyone_ecif.progress import result_of

BATCH = 12


@pytest.fixture
def pairs(dataset, tmp_path):
    """Pairs in threes: an image, its copy with another caption, its caption with another image."""
    train, val = dataset.match_tags("train").limit(36), dataset.match_tags("val")
    for view in (train, val):
        samples = list(view)
        for first, copy, likeness in zip(samples[::3], samples[1::3], samples[2::3], strict=True):
            for sample, caption in ((copy, f"{first.caption}, seen again"), (likeness, first.caption)):
                path = tmp_path / f"{sample.id}.png"
                shutil.copy(first.filepath, path)
                sample["filepath"], sample["caption"] = str(path), caption
                sample.save()
            with Image.open(likeness.filepath) as image:
                image.rotate(5).save(likeness.filepath)
    return train, val


def by_hand(similarity, captions, contents):
    """The sum of the losses of a batch, by loops over what competes."""
    total = similarity.new_zeros(())
    for i in range(len(captions)):
        rivals = [
            j for j in range(len(captions)) if j == i or (captions[j] != captions[i] and contents[j] != contents[i])
        ]
        total = total + similarity[i, rivals].logsumexp(0) + similarity[rivals, i].logsumexp(0) - 2 * similarity[i, i]
    return total


def test_scores_are_what_removal_changes(pairs, score, caplog):
    train, val = pairs
    results = score(train, val, fit=True, spare_equal=True, batch_size=BATCH)
    assert not any("each is a negative of the other" in message for message in caplog.messages)
    prepared, objective, theta = follow(reopen(results), progress=False)
    captions, contents = prepared.pairs.captions, [Path(path).read_bytes() for path in prepared.pairs.paths]

    def loss(batches):
        total = objective.proximal / 2 * (theta - objective.scope.start).square().sum()
        for rows, batch in zip(batches.partition, batches, strict=True):
            similarity = objective.scope.similarity(theta, batch)
            total = total + by_hand(similarity, [captions[r] for r in rows], [contents[r] for r in rows]) / 36
        return total

    torch.testing.assert_close(objective.loss(theta), loss(objective.batches))
    (target,) = prepared.targets.values()
    scores = dict(zip(*train.values(["id", "ecif_influence"]), strict=True))
    order = np.argsort([scores[sample] for sample in results.ids])
    real = []
    for row in (few := [*order[:3], *order[-3:]]):
        left = objective.without(torch.tensor([row]))
        torch.testing.assert_close(left.loss(theta), loss(left.batches))
        *_, (refitted, _) = minimise(left, 1e-8, start=theta)
        real.append((target.loss(refitted) - target.loss(theta)).item())
    assert np.corrcoef([scores[results.ids[row]] for row in few], real)[0, 1] > 0.97
    plain = score(train, val, fit=True, batch_size=BATCH, brain_key="plain")
    assert "unless spare_equal=True" in caplog.text
    assert plain.config.store != results.config.store
    assert plain.config.target["tables"] != results.config.target["tables"]
    assert np.corrcoef(*[train.values(f"{key}_influence") for key in ("ecif", "plain")])[0, 1] < 0.999


def test_what_follows_a_run_spares_them_too(pairs, score, tmp_path):
    train, val = pairs
    results = score(train, val, fit=True, spare_equal=True, batch_size=BATCH)
    assert results.config.spare_equal
    worst = train.sort_by("ecif_rank").limit(2).values("id")
    edit = edit_model(results, worst, str(tmp_path / "edited.pt"))
    prepared, objective, theta = follow(reopen(results), progress=False)
    rows = torch.tensor([results.ids.index(sample) for sample in worst])
    *_, (refitted, _) = minimise(objective.without(rows), 1e-8, start=theta)
    step = result_of(removal_step(objective, theta, rows, "hessian", tolerance=1e-6)).vector
    assert torch.cosine_similarity(step, refitted - theta, dim=0) > 0.9
    (target,) = prepared.targets.values()
    assert edit.target_loss_after == pytest.approx(target.loss(theta + step).item(), rel=1e-2)
    assert edit.target_loss_after < edit.target_loss_before
    predicted = edit.target_loss_predicted - edit.target_loss_before
    assert group_influence(results, worst).influence == pytest.approx(predicted, rel=1e-2)
    query = trace(results, count=1)[0].id
    (exact,), (stored,) = (trace(results, [query], count=1000, exact=way) for way in (True, False))
    rough = {culprit.id: culprit.influence for culprit in stored.culprits}
    both = [(culprit.influence, rough[culprit.id]) for culprit in exact.culprits if culprit.id in rough]
    assert len(both) > 10
    assert np.corrcoef(*np.transpose(both))[0, 1] > 0.9


def test_inside_the_towers(pairs, score):
    train, val = pairs
    scores = []
    for spare in (False, True):
        results = score(train, val, scope="lora:2", spare_equal=spare, batch_size=BATCH, brain_key=f"lora_{spare}")
        scores.append(train.values(f"lora_{spare}_influence"))
        (target,), theta = reopened(results)
        losses = []
        for rows, batch in zip(target.batches.partition, target.batches, strict=True):
            found = next(iter(results.target_ids.values()))
            samples = [val[found[row]] for row in rows.tolist()]
            similarity = target.scope.similarity(theta, batch)
            contents = [Path(sample.filepath).read_bytes() if spare else object() for sample in samples]
            captions = [sample.caption if spare else object() for sample in samples]
            losses.append(by_hand(similarity, captions, contents))
        assert results.diagnostics["target_loss"] == pytest.approx(sum(losses).item() / len(val), rel=1e-5)
    assert np.isfinite(scores).all()
    assert np.corrcoef(*scores)[0, 1] < 0.999


def reopened(results):
    prepared, _, theta = follow(reopen(results), progress=False)
    return prepared.targets.values(), theta


def test_where_no_two_are_equal_it_changes_nothing(dataset, score):
    train, val = dataset.match_tags("train").limit(20), dataset.match_tags("val").limit(12)
    for number, sample in enumerate(list(train) + list(val)):
        sample["caption"] = f"{sample.caption}, number {number}"
        sample.save()
    first = score(train, val, batch_size=BATCH)
    second = score(train, val, batch_size=BATCH, spare_equal=True, brain_key="spared")
    assert train.values("ecif_influence") == train.values("spared_influence")
    assert first.config.store == second.config.store


def test_a_fine_tuned_model_is_trained_so(pairs, made, tmp_path):
    train, _ = pairs
    options = {"model": "ecif-digits", "pretrained": made[1], "batch_size": BATCH, "epochs": 1, "device": "cpu"}
    losses = [
        fit_model(train, tmp_path / f"{spare}.pt", spare_equal=spare, **options)["loss_before"]
        for spare in (False, True)
    ]
    assert losses[1] < losses[0] - 0.01  # there are fewer to be mistaken for
