"""What the panel shows of scores, against the same found the long way."""

import itertools
import math

import numpy as np
import pytest

from fiftyone_ecif import compute_misalignment
from fiftyone_ecif.api.inspection import inspect_pair
from fiftyone_ecif.demo.training import MODEL
from fiftyone_ecif.runs.score_table import ScoreTable, read_score_table
from fiftyone_ecif.samples.selection import select_by_influence


def board(count=500, seed=0):
    generator = np.random.default_rng(seed)
    columns = {"a": generator.normal(size=count), "b": generator.normal(size=count)}
    columns["b"][::7] = math.nan
    return ScoreTable([f"s{row}" for row in range(count)], columns)


def test_a_probability_is_drawn_by_its_log_odds():
    """Two heaps close to 0 and close to 1, which on a straight axis are a bar each."""
    generator = np.random.default_rng(0)
    odds = np.concatenate([generator.normal(-4, 0.7, 900), generator.normal(3, 0.7, 98)])
    chances = np.append(1 / (1 + np.exp(-odds)), [0.0, 1.0])  # as of reviewed pairs
    edges, counts = ScoreTable([str(n) for n in range(1000)], {"a_misalignment": chances}).histogram("a_misalignment")
    assert counts.sum() == 1000
    assert (edges[0], edges[-1]) == (0, 1)
    np.testing.assert_array_equal(counts, np.histogram(chances, edges)[0])
    widths = np.diff(np.log(edges[1:-1] / (1 - edges[1:-1])))
    np.testing.assert_allclose(widths, widths[0], rtol=1e-6)
    assert (counts > 2).sum() > 20


def test_a_histogram_counts_every_score_once():
    edges, counts = board().histogram("b", bins=20)
    assert counts.sum() == np.isfinite(board().columns["b"]).sum()
    assert len(edges) == 21
    within = [len(board().between("b", low, np.nextafter(high, -9))) for low, high in itertools.pairwise(edges[:-1])]
    assert within == counts[:-1].tolist()


def test_few_points_keep_the_extremes():
    full = board(10_000)
    rows = full.points("a", "b", limit=640)
    assert len(rows) == len(set(rows.tolist())) == 640
    both = np.flatnonzero(np.isfinite(full.columns["b"]))
    for field in ("a", "b"):
        order = both[np.argsort(full.columns[field][both])]
        assert set(order[:40]) | set(order[-40:]) <= set(rows)
    assert np.isfinite(full.columns["b"][rows]).all()


def test_ranks_and_values():
    small = ScoreTable(["x", "y", "z"], {"a": np.array([0.5, 2.0, math.nan])})
    assert small.place("a", "y") == (1, "highest")
    assert small.place("a", "x") == (1, "lowest")
    many = ScoreTable(list("abcdef"), {"a": np.array([0.0, 1.0, 2.0, 3.0, 4.0, math.nan])})
    assert [many.place("a", sample)[0] for sample in "abcde"] == [1, 2, 3, 2, 1]
    assert small.value("a", "x") == 0.5
    assert small.value("a", "z") is None
    assert small.value("a", "unknown") is None
    assert small.ordered("a", ["y", "x", "y", "unknown"]) == ["x", "y"]


@pytest.fixture
def scored(dataset, score):
    train = dataset.match_tags("train")
    return score(train, dataset.match_tags("val"), fit=True)


@pytest.mark.parametrize("direction", ["harmful", "valuable"])
@pytest.mark.parametrize("share", [0.001, 0.1, 1.0])
def test_a_cut_is_what_tagging_by_share_takes(dataset, scored, direction, share):
    cut = read_score_table(dataset).cut("ecif_influence", direction, share)
    taken = select_by_influence(dataset, "ecif_influence", direction, share=share)
    assert cut.ids == taken.values("id")
    assert cut.threshold == taken.values("ecif_influence")[-1]


def test_an_empty_cut(dataset, scored):
    assert read_score_table(dataset).cut("ecif_influence", "harmful", 0.0) == ([], None)


def test_the_scores_of_all_runs_are_read_anew_when_one_changes(dataset, score, made):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    assert read_score_table(dataset).columns == {}
    score(train.limit(40), val)
    first = read_score_table(dataset)
    assert read_score_table(dataset) is first
    assert len(first.ids) == 40
    compute_misalignment(train, model=MODEL, pretrained=made[1], num_workers=0, batch_size=24)
    both = read_score_table(dataset)
    assert {"ecif_influence", "ecif_positive", "ecif_negative", "audit_misalignment"} == set(both.columns)
    assert len(both.ids) == len(train)
    assert np.isnan(both.columns["ecif_influence"]).sum() == len(train) - 40
    dataset.delete_samples(train.first())
    assert len(read_score_table(dataset).ids) == len(train)
    document = dataset._doc.brain_methods["ecif"]
    results, document.results = document.results, None  # as while it is written
    assert set(read_score_table(dataset).columns) == {"audit_misalignment"}
    document.results = results
    before = read_score_table(dataset).columns["ecif_influence"]
    dataset.set_field("ecif_influence", 1.0).save("ecif_influence")
    dataset.load_brain_results("ecif").save()
    after = read_score_table(dataset).columns["ecif_influence"]
    assert not np.array_equal(before, after)
    assert (after == 1).all()


def test_a_portrait_against_the_whole_matrix(dataset, scored):
    cached, target_pairs = scored.cached(), scored.target_pairs()
    influence = np.sum(cached.influence(target_pairs.gradients), axis=0)
    row = int(np.argmin(influence.sum(0)))
    seen = inspect_pair(scored, scored.ids[row], count=3)
    order = np.argsort(influence[:, row])
    assert [link.id for link in seen.harms] == [target_pairs.ids[place] for place in order[:3]]
    np.testing.assert_allclose([link.value for link in seen.harms], influence[order[:3], row], rtol=1e-6)
    assert [link.id for link in seen.helps] == [target_pairs.ids[place] for place in order[::-1][:3]]
    images = scored.image_embeddings()
    similarity = images @ images[row]
    similarity[row] = -2
    assert [link.id for link in seen.neighbours] == [scored.ids[n] for n in np.argsort(-similarity)[:3]]


def test_a_portrait_without_a_target_or_a_store(dataset, made):
    train = dataset.match_tags("train")
    audit = compute_misalignment(train, model=MODEL, pretrained=made[1], num_workers=0, batch_size=24)
    seen = inspect_pair(audit, audit.ids[5])
    assert seen.harms == seen.helps == []
    assert len(seen.neighbours) == 5
    assert audit.ids[5] not in [link.id for link in seen.neighbours]
    from fiftyone_ecif.store.tables import Store

    Store(*audit.config.store).delete()
    assert inspect_pair(audit, audit.ids[5]) == ([], [], [])
