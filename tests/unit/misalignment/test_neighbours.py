"""Nearest neighbours against a dense similarity matrix."""

import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment import neighbours
from fiftyone_ecif.misalignment.neighbours import nearest


def draw(pairs=37, width=6, seed=0):
    return torch.randn(pairs, width, generator=torch.Generator().manual_seed(seed))


def brute_force(embeddings, group):
    """Each row's possible neighbours as ``(similarity, row)``, the nearest first."""
    rows = embeddings.double().tolist()
    lengths = [sum(x * x for x in row) ** 0.5 for row in rows]
    return [
        sorted(
            (
                (sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) / lengths[i] / lengths[j], j)
                for j in range(len(rows))
                if group[i] != group[j]
            ),
            reverse=True,
        )
        for i in range(len(rows))
    ]


@pytest.fixture(params=[(1024, 16384), (5, 4), (7, 1), (1, 36)], ids=str)
def blocks(request, monkeypatch):
    monkeypatch.setitem(neighbours._BLOCK, "cpu", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("groups", [None, 9])
def test_blocks_give_what_the_whole_matrix_gives(blocks, groups, dtype):
    embeddings = draw().to(dtype)
    group = None if groups is None else torch.arange(37) % groups
    found = nearest(embeddings, 6, group)
    expected = brute_force(embeddings, list(range(37)) if group is None else group.tolist())
    assert found.rows.shape == found.similarity.shape == (37, 6)
    assert found.similarity.dtype == torch.float32
    assert found.rows.tolist() == [[j for _, j in row[:6]] for row in expected]
    torch.testing.assert_close(
        found.similarity, torch.tensor([[value for value, _ in row[:6]] for row in expected]), atol=1e-6, rtol=1e-5
    )


def test_no_row_is_its_own_neighbour(blocks):
    found = nearest(draw(), 36)
    assert [sorted(row) for row in found.rows.tolist()] == [[j for j in range(37) if j != i] for i in range(37)]
    assert torch.isfinite(found.similarity).all()


def test_rows_that_point_away_are_neighbours_too(blocks):
    """Similarities below zero, so that nothing that stands for a missing neighbour may win."""
    embeddings = torch.eye(8) - 1.0
    embeddings[1:] *= -1
    found = nearest(embeddings[:2], 1)
    assert found.rows.tolist() == [[1], [0]]
    assert (found.similarity < 0).all()


def test_length_does_not_matter():
    embeddings = draw()
    scaled = embeddings * torch.linspace(0.01, 100, 37)[:, None]
    assert torch.equal(nearest(embeddings, 5).rows, nearest(scaled, 5).rows)


def test_equal_rows_are_neighbours_unless_they_are_one_group(blocks):
    embeddings = draw()
    embeddings[20] = embeddings[3]
    apart = nearest(embeddings, 2)
    assert (apart.rows[3, 0], apart.rows[20, 0]) == (20, 3)
    assert apart.similarity[3, 0].item() == pytest.approx(1)
    group = torch.arange(37)
    group[20] = 3
    together = nearest(embeddings, 35, group)
    assert 20 not in together.rows[3].tolist()
    assert 3 not in together.rows[20].tolist()
    assert {3, 20} <= set(together.rows[5].tolist())


def test_as_many_neighbours_as_the_largest_group_leaves(blocks):
    group = torch.tensor([0] * 4 + [1, 2, 3])
    found = nearest(draw(7), 30, group)
    assert found.rows.shape == (7, 3)
    assert found.rows[0].sort().values.tolist() == [4, 5, 6]
    assert torch.isfinite(found.similarity).all()
    assert nearest(draw(4), 30).rows.shape == (4, 3)


def test_a_row_of_zeros_is_like_nothing():
    embeddings = draw(5)
    embeddings[2] = 0
    assert nearest(embeddings, 4).similarity[2].tolist() == [0] * 4


@pytest.mark.parametrize("pairs", [1, 6])
def test_copies_only(pairs):
    with pytest.raises(EcifError, match=f"All {pairs} pairs are copies"):
        nearest(draw(pairs), 3, torch.zeros(pairs, dtype=torch.long))


@pytest.mark.parametrize("columns", [64 * 30, 64 * 30 + 17])
def test_the_best_of_chunks_are_the_best(columns):
    similarity = draw(20, columns)
    similarity[:10, 100:164] += 3  # all of the best in two chunks; in the other rows they are anywhere
    found, expected = neighbours._top(similarity, 9), similarity.topk(9, dim=1)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


@pytest.fixture
def index_only(monkeypatch):
    monkeypatch.setattr(neighbours, "EXACT_ON_CPU", 0)


@pytest.mark.parametrize("width", [32, 200])  # codes of one number and of two
def test_an_index_finds_nearly_all_neighbours_with_their_exact_similarity(width, index_only, monkeypatch):
    exact, searched = neighbours._exact, []

    def watched(units, rows, *of):
        searched.append(len(rows))
        return exact(units, rows, *of)

    monkeypatch.setattr(neighbours, "_exact", watched)
    centres = draw(60, width, seed=1)
    embeddings = centres[torch.arange(6000) % 60] + 0.7 * draw(6000, width)
    found = nearest(embeddings, 10)
    assert searched == [256]  # those that it is tried on
    units = torch.nn.functional.normalize(embeddings, dim=1)
    dense = (units @ units.T).fill_diagonal_(-1)
    expected = dense.topk(10, dim=1)
    hits = (found.rows[:, :, None] == expected.indices[:, None]).any(2).float().mean()
    assert hits > 0.98
    torch.testing.assert_close(found.similarity, dense.gather(1, found.rows))
    assert (found.similarity.diff(dim=1) <= 0).all()


def test_an_index_leaves_copies_out_however_many(index_only):
    embeddings = draw(500, 16)
    embeddings[100:200] = embeddings[100] + 1e-3 * draw(100, 16)
    group = torch.arange(500)
    group[100:200] = 100
    found = nearest(embeddings, 5, group)
    assert (group[found.rows] != group[:, None]).all()
    assert torch.isfinite(found.similarity).all()
    exact = torch.nn.functional.normalize(embeddings, dim=1)
    dense = (exact @ exact.T).masked_fill(group[:, None] == group, -torch.inf)
    assert torch.equal(found.rows[100:200], dense.topk(5, dim=1).indices[100:200])


def test_where_an_index_finds_too_few_all_rows_are_compared(index_only, monkeypatch):
    monkeypatch.setattr(neighbours, "_MOST_COMPARED", 12)
    embeddings = draw(600, 300)  # codes of two numbers each tell little of noise
    found = nearest(embeddings, 10)
    units = torch.nn.functional.normalize(embeddings, dim=1)
    expected = (units @ units.T).fill_diagonal_(-1).topk(10, dim=1)
    torch.testing.assert_close(found.similarity, expected.values)


def test_an_index_that_need_only_find_what_is_alike_finds_that_in_few_lists(index_only):
    embeddings = draw(6000, 40)
    twins = embeddings[:500] + 0.01 * draw(500, 40, seed=1)
    embeddings = torch.cat([embeddings, twins])
    found = nearest(embeddings, 4, alike=0.999)
    assert (found.rows[:500, 0] == torch.arange(6000, 6500)).float().mean() > 0.98
    assert (found.rows[6000:, 0] == torch.arange(500)).float().mean() > 0.98
    units = torch.nn.functional.normalize(embeddings, dim=1)
    few = neighbours._Index(units, 4, torch.arange(6500), 0.999)
    many = neighbours._Index(units, 4, torch.arange(6500), None)
    assert few._index.nprobe < many._index.nprobe / 10
