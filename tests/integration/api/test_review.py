"""Learning from tagged pairs which of the others are misaligned."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fiftyone_ecif import EcifError
from fiftyone_ecif.api.misalignment import compute_misalignment
from fiftyone_ecif.api.review import propose_pairs, read_labels, review_misalignment
from fiftyone_ecif.demo import training
from fiftyone_ecif.misalignment.active_learning import auroc_with_interval, propose
from fiftyone_ecif.misalignment.judgement import judge


def test_the_interval_of_an_auroc_holds_it():
    random = np.random.default_rng(0)
    wrong = random.random(60) < 0.4
    scores = random.normal(size=60) + wrong
    auroc, low, high = auroc_with_interval(scores, wrong)
    assert auroc == pytest.approx(roc_auc_score(wrong, scores))
    assert 0.5 < low < auroc < high < 1
    assert auroc_with_interval(np.array([0.0, 1.0]), np.array([False, True])) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [1, 2, 4, 10, 20])
def test_proposals_are_uncertain_ones_and_others(count):
    random = np.random.default_rng(0)
    probability, known = random.random(200), random.random(200) < 0.3
    found = propose(probability, known, count)
    assert len(found) == len(set(found)) == count
    assert not known[found].any()
    assert all(type(row) is int for row in found)
    uncertain = sorted(np.flatnonzero(~known), key=lambda row: abs(probability[row] - 0.5))
    share = round(0.75 * count)
    assert found[:share] == uncertain[:share]
    assert propose(probability, known, count) == found
    others = [set(propose(probability, known, count, seed)[share:]) for seed in range(5)]
    assert len({*map(frozenset, others)}) > 1 or share == count
    assert not any(part & set(found[:share]) for part in others)


def test_no_more_than_are_left_are_proposed():
    known = np.arange(30) > 4
    assert sorted(propose(np.full(30, 0.5), known, 20)) == [0, 1, 2, 3, 4]
    assert propose(np.full(30, 0.5), np.ones(30, dtype=bool), 20) == []


@pytest.mark.parametrize("count", [0, -3])
def test_no_proposals_at_all_are_an_error(count):
    with pytest.raises(EcifError, match=f"count={count}"):
        propose(np.full(5, 0.5), np.zeros(5, dtype=bool), count)


@pytest.fixture
def reviewed(dataset, made):
    """A run on the small demo set, and a function that tags some of its pairs."""
    train = dataset.match_tags("train")
    results = compute_misalignment(
        train, model=training.MODEL, pretrained=made[1], batch_size=24, num_workers=0, fit=False, progress=False
    )
    spoiled = dict(zip(*train.values(["id", "spoiled"]), strict=True))
    wrong = [sample for sample in results.ids if spoiled[sample]]
    right = [sample for sample in results.ids if not spoiled[sample]]

    def tag(misaligned, aligned):
        dataset.select(wrong[misaligned]).tag_samples("misaligned")
        dataset.select(right[aligned]).tag_samples("aligned")
        return wrong[misaligned], right[aligned]

    return results, tag


def value(dataset, sample):
    return dataset[sample].audit_misalignment


def test_a_review_end_to_end(dataset, reviewed):
    results, tag = reviewed
    before, rate = results.evidence(), results.noise_rate
    wrong, right = tag(slice(0, 6), slice(0, 9))
    learned = review_misalignment(results, 12)
    assert (learned.misaligned, learned.aligned) == (6, 9)
    assert 0 <= learned.auroc_low <= learned.auroc <= learned.auroc_high <= 1
    train = dataset.match_tags("train")
    found = dict(zip(*train.values(["id", "audit_misalignment"]), strict=True))
    assert {found[sample] for sample in wrong} == {1.0}
    assert {found[sample] for sample in right} == {0.0}
    assert all(0 < found[sample] < 1 for sample in set(results.ids) - {*wrong, *right})
    assert learned.expected == pytest.approx(sum(found.values()))
    assert len(learned.proposals) == len(set(learned.proposals)) == 12
    assert not set(learned.proposals) & {*wrong, *right}
    assert dataset.match_tags("val").values("audit_misalignment") == [None] * 24
    judgement = judge(results.evidence(), read_labels(results))
    np.testing.assert_allclose([found[sample] for sample in results.ids], judgement.probability)
    assert results.noise_rate == pytest.approx(judgement.rate)
    assert results.noise_rate != rate
    reasons = dict(zip(*train.values(["id", "audit_reason"]), strict=True))
    assert [reasons[sample] for sample in results.ids] == judgement.reasons

    assert dataset.get_field("audit_misalignment").description.endswith("by your review")
    assert results.diagnostics["review"] == {**learned._asdict(), "proposals": 12}
    dataset.reload()
    assert dataset.get_field("audit_misalignment").description.endswith("by your review")
    again = dataset.load_brain_results("audit", cache=False)
    assert again.diagnostics == results.diagnostics
    assert again.config.reviewed
    np.testing.assert_array_equal(again.evidence().pairs, before.pairs)

    expected = [value(dataset, sample) for sample in results.ids]
    assert review_misalignment(again, 12) == learned
    assert [value(dataset, sample) for sample in results.ids] == expected
    tag(slice(6, 8), slice(9, 12))
    more = review_misalignment(again, 12)
    assert (more.misaligned, more.aligned) == (8, 12)
    assert set(more.proposals).isdisjoint(dataset.match_tags(["aligned", "misaligned"]).values("id"))

    dataset.delete_brain_run("audit")
    assert not [field for field in dataset.get_field_schema() if field.startswith("audit")]


def test_a_run_that_is_overwritten_is_not_reviewed(dataset, reviewed, made):
    results, tag = reviewed
    tag(slice(0, 4), slice(0, 4))
    before = dataset.values("audit_misalignment")
    review_misalignment(results)
    again = compute_misalignment(
        dataset.match_tags("train"),
        model=training.MODEL,
        pretrained=made[1],
        batch_size=24,
        num_workers=0,
        fit=False,
        overwrite=True,
        progress=False,
    )
    assert dataset.values("audit_misalignment") == before
    assert again.config.reviewed is None
    assert dataset.get_brain_info("audit").config.reviewed is None
    assert not dataset.get_field("audit_misalignment").description.endswith("by your review")
    assert "review" not in dataset.load_brain_results("audit", cache=False).diagnostics


def test_a_review_after_renaming_goes_to_the_new_field(dataset, reviewed):
    results, tag = reviewed
    wrong, _ = tag(slice(0, 4), slice(0, 4))
    dataset.rename_brain_run("audit", "better")
    review_misalignment(results)
    assert dataset[wrong[0]].better_misalignment == 1
    assert not dataset.has_sample_field("audit_misalignment")
    assert dataset.get_brain_info("better").config.reviewed
    dataset.rename_brain_run("better", "best")
    dataset.delete_brain_run("best")
    assert not [field for field in dataset.get_field_schema() if field.startswith(("audit", "bet", "best"))]


def test_samples_that_were_deleted_since_are_passed_over(dataset, reviewed):
    results, tag = reviewed
    wrong, right = tag(slice(0, 5), slice(0, 5))
    gone = [wrong[0], next(sample for sample in results.ids if sample not in {*wrong, *right})]
    dataset.delete_samples(gone)
    learned = review_misalignment(results, 100)
    assert (learned.misaligned, learned.aligned) == (4, 5)
    assert value(dataset, wrong[1]) == 1
    assert dataset.count("audit_misalignment") == 70
    assert not set(learned.proposals) & set(gone)
    assert len(learned.proposals) == 72 - 10 - 1
    assert not set(propose_pairs(results, 100)) & set(gone)
    assert learned.expected <= 70


def test_tags_of_other_samples_do_not_count(dataset, reviewed):
    results, tag = reviewed
    tag(slice(0, 3), slice(0, 3))
    dataset.match_tags("val").tag_samples("misaligned")
    labels = read_labels(results)
    assert labels.shape == (72,)
    assert [(labels == label).sum() for label in (0, 1, -1)] == [3, 3, 66]


def test_bad_reviews_change_nothing(dataset, reviewed):
    results, tag = reviewed
    before = dataset.values("audit_misalignment")
    wrong, _ = tag(slice(0, 1), slice(0, 4))
    with pytest.raises(EcifError, match="At least 2 pairs of run 'audit' must be tagged 'misaligned', there are 1"):
        review_misalignment(results)
    tag(slice(1, 2), slice(0, 0))
    with pytest.raises(EcifError, match="count=0"):
        review_misalignment(results, 0)
    dataset.select(wrong[0]).tag_samples("aligned")
    with pytest.raises(EcifError, match=f"Sample {wrong[0]} is tagged 'aligned' and 'misaligned'"):
        review_misalignment(results)
    assert dataset.values("audit_misalignment") == before
    assert results.config.reviewed is None
    assert not dataset.get_field("audit_misalignment").description.endswith("by your review")


def test_the_first_proposals_need_no_tags(dataset, reviewed):
    results, _ = reviewed
    found = propose_pairs(results, 16)
    assert len(set(found)) == 16
    assert set(found) <= set(results.ids)
    assert propose_pairs(results, 16) == found
    probability = judge(results.evidence()).probability
    doubt = dict(zip(results.ids, np.abs(probability - 0.5), strict=True))
    assert max(doubt[sample] for sample in found[:12]) <= sorted(doubt.values())[11] + 1e-9
