"""Pairs are tagged by the operator."""

import fiftyone as fo
import pytest
from operator_driver import operator, resolve


def test_what_was_tagged_shows_the_rank_and_is_what_an_edit_would_take_out(dataset, options):
    operator("compute_influence")(dataset.match_tags("train"), **options)
    told = operator("tag_by_influence")(dataset, count=5).executor.to_json()["requests"]
    (shown,) = [request["params"]["fields"] for request in told if request["operator_uri"] == "set_active_fields"]
    assert shown == ["caption", "ecif_rank"]
    assert resolve(dataset, "edit_model", {})["remove"]["default"] == "tag: harmful"


@pytest.fixture
def few(dataset):
    """Scores of 60 pairs, 20 of which harm, in a dataset of 96."""
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    ids = dataset.match_tags("train").values("id")[:60]
    dataset.set_values("ecif_influence", {i: (n - 20) / 10 or 0.01 for n, i in enumerate(ids)}, key_field="id")
    return dataset


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"limit": "share", "percent": 10}, "6 pairs will be tagged"),
        ({"limit": "share", "share": 0.1}, "6 pairs will be tagged"),
        ({"limit": "count", "count": 15}, "15 pairs will be tagged"),
        (
            {"limit": "count", "count": 30},
            "20 pairs will be tagged, not 30: of the 96 samples to choose among, 60 have this score, and 20 of those "
            "are harmful",
        ),
        ({"limit": "threshold", "threshold": 1.0}, "20 pairs will be tagged"),
    ],
)
def test_the_tag_form_counts_and_says_what_limits_it(few, params, said):
    entered = {"field": "ecif_influence", "direction": "harmful", **params}
    assert resolve(few, "tag_by_influence", entered)["preview"]["view"]["label"] == said
    result = operator("tag_by_influence")(few, **entered).result
    assert result == {"tag": "harmful", "count": int(said.split()[0])}
    assert max(few.match_tags("harmful").values("ecif_influence")) < 0


def test_the_tag_form_says_where_there_are_more(few):
    stages = few.exists("ecif_influence").limit(5)._serialize()
    params = {"field": "ecif_influence", "direction": "harmful", "count": 100}
    said = resolve(few, "tag_by_influence", params, view=stages)["preview"]["view"]["label"]
    assert said.endswith("5 of those are harmful. The whole dataset has 20: choose 'Entire dataset' at the top")


@pytest.mark.parametrize(
    ("params", "field", "message"),
    [
        ({"limit": "share", "percent": 0}, "percent", "more than 0 and at most 100"),
        ({"limit": "share", "share": 7}, "share", "Share 7"),
        ({"count": 0}, "count", "Pairs 0 must be at least 1"),
        ({"count": 5, "tag": "aligned"}, "tag", "'aligned' is reserved"),
    ],
)
def test_the_tag_form_says_what_is_wrong(few, params, field, message):
    found = resolve(few, "tag_by_influence", {"field": "ecif_influence", **params})[field]
    assert found["invalid"]
    assert message in found["error_message"]


def test_the_tag_goes_with_the_end_that_is_chosen(few):
    tagged = operator("tag_by_influence")(few, direction="valuable", count=3).result
    assert tagged == {"tag": "valuable", "count": 3}
    form = resolve(few, "tag_by_influence", {"direction": "valuable"})
    assert form["tag"]["default"] is None
    assert form["tag"]["view"]["description"] == "'valuable' if left empty"


def test_the_tag_form_starts_with_the_score_of_a_run(dataset):
    for field in ("a_size", "audit_misalignment"):
        dataset.add_sample_field(field, fo.FloatField)
    form = resolve(dataset, "tag_by_influence", {})
    assert form["field"]["default"] == "audit_misalignment"
    assert "direction" not in form  # the least suspicious ones are of no interest
    assert form["tag"]["view"]["description"] == "'suspicious' if left empty"
    dataset.add_sample_field("ecif_influence", fo.FloatField)
    form = resolve(dataset, "tag_by_influence", {})
    assert (form["field"]["default"], form["direction"]["default"]) == ("ecif_influence", "harmful")
