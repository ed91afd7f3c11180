"""Reviews by the operator."""

import pytest
from fiftyone.operators.executor import ExecutionContext, Executor
from operator_driver import operator, resolve, shown_ids

from fiftyone_ecif import EcifError, propose_pairs


def tag_by_truth(dataset, ids):
    """Tags pairs as a person would who knows which captions were spoiled."""
    for tag, spoiled in (("aligned", False), ("misaligned", True)):
        dataset.select(ids).exists("spoiled", spoiled).tag_samples(tag)


def what_it_means(results):
    """The notice below the numbers that a review shows."""
    ctx = ExecutionContext(request_params={"params": {"brain_key": "audit"}, "results": results}, executor=Executor())
    outputs = operator("review_misalignment").resolve_output(ctx).to_json()["type"]["properties"]
    assert set(outputs) == {*results, "means"}
    return outputs["means"]["view"]["label"]


def test_a_review_first_proposes_then_learns(dataset, detect):
    detect(fit=False)
    review = operator("review_misalignment")
    first = review(dataset, count=8)
    assert first.result == {"aligned": 0, "misaligned": 0, "proposed": 8}
    assert "run this again" in what_it_means(first.result)
    proposed = shown_ids(dataset, first)
    assert proposed == propose_pairs(dataset.load_brain_results("audit"), 8)

    tag_by_truth(dataset, proposed[:1])
    again = review(dataset, count=8)
    assert again.result["proposed"] == 8
    assert proposed[0] not in shown_ids(dataset, again)

    tag_by_truth(dataset, dataset.match_tags("train").values("id")[:40])
    learned = review(dataset.match_tags("val"), count=5)  # a view stands for its dataset
    counts = dataset.count_sample_tags()
    assert (learned.result["aligned"], learned.result["misaligned"]) == (counts["aligned"], counts["misaligned"])
    kept = dataset.load_brain_results("audit", cache=False).diagnostics["review"]
    assert learned.result["auroc"] == f"{kept['auroc']:.2f} ({kept['auroc_low']:.2f} to {kept['auroc_high']:.2f})"
    assert learned.result["expected"] == f"{kept['expected']:,.0f} of 72"
    assert "is now the probability" in what_it_means(learned.result)
    assert len(shown_ids(dataset, learned)) == learned.result["proposed"] == 5
    assert not set(shown_ids(dataset, learned)) & set(dataset.match_tags(["aligned", "misaligned"]).values("id"))
    assert set(dataset.match_tags("misaligned").values("audit_misalignment")) == {1.0}


def test_a_review_of_everything_shows_the_scores(dataset, detect):
    detect(fit=False)
    tag_by_truth(dataset, dataset.match_tags("train").values("id"))
    result = operator("review_misalignment")(dataset)
    assert result.result["proposed"] == 0
    scores = dataset.select(shown_ids(dataset, result), ordered=True).values("audit_misalignment")
    assert len(scores) == 72
    assert scores == sorted(scores, reverse=True)


def test_the_form_of_a_review_counts_tags(dataset, detect):
    detect(fit=False)
    dataset.match_tags("val").tag_samples("aligned")  # not of the run, so they do not count
    entered = {"brain_key": "audit"}
    form = resolve(dataset, "review_misalignment", {"brain_key": "audit", "count": 0})
    assert form["brain_key"]["default"] == "audit"
    assert form["count"]["invalid"]
    said = form["tags"]["view"]["label"]
    assert said.startswith("So far 0 pairs are tagged 'aligned' and 0 'misaligned'. It takes 2 of each to learn.")
    ids = dataset.match_tags("train").values("id")
    dataset.select(ids[:3]).tag_samples("aligned")
    dataset.select(ids[2:4]).tag_samples("misaligned")
    form = resolve(dataset, "review_misalignment", entered)
    assert form["tags"]["view"]["label"].startswith("So far 3 pairs are tagged 'aligned' and 2 'misaligned'. The score")
    assert form["both"]["view"]["label"].startswith("1 pairs have both tags")


def test_a_review_without_a_run_is_refused(dataset):
    with pytest.raises(EcifError, match="run Detect misaligned pairs first"):
        operator("review_misalignment")(dataset)
