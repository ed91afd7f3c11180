"""From mistakes to the training pairs behind them."""

import shutil
import subprocess
import sys

import fiftyone as fo
import numpy as np
import pytest
import torch
from torch.func import grad

from fiftyone_ecif import EcifError, trace
from fiftyone_ecif.api import tracing
from fiftyone_ecif.api.preparation import reopen
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.gradient_store import GradientStore
from fiftyone_ecif.influence.linear_solve import conjugate_gradient
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.store.tables import Store, Table


@pytest.fixture(scope="module")
def run(made):
    """A fitted run and its target, with a class for each target pair."""
    from fiftyone_ecif import compute_influence

    dataset = made[0].clone()
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    val.set_values("kind", [caption.split()[1] for caption in val.values("caption")])
    results = compute_influence(
        train, target=val, model="ecif-digits", pretrained=made[1], num_workers=0, batch_size=24, fit=True
    )
    yield results, train, val
    dataset.delete()


def test_mistakes_by_default_worst_first(run):
    results, _, _ = run
    target_pairs = results.target_pairs()
    assert 0 < target_pairs.mistakes.sum() < len(target_pairs.ids)
    found = trace(results, count=5)
    assert {one.id for one in found} == {target_pairs.ids[row] for row in np.flatnonzero(target_pairs.mistakes)}
    losses = dict(zip(target_pairs.ids, target_pairs.losses, strict=True))
    assert [one.loss for one in found] == sorted((losses[one.id] for one in found), reverse=True)


def test_culprits_are_ranked_by_relative_influence_and_only_harmful(run):
    results, train, _ = run
    gradients, target_pairs = results.cached(), results.target_pairs()
    everything = trace(results, count=1000)
    for one in everything:
        gradient = target_pairs.gradients[[target_pairs.ids.index(one.id)]]
        influence = np.sum(gradients.influence(gradient), axis=0)[0]
        relative = gradients.relative_influence(gradient)[0]
        harmful = [int(row) for row in np.argsort(relative) if relative[row] < 0]
        assert [culprit.id for culprit in one.culprits] == [results.ids[row] for row in harmful]
        assert 0 < len(harmful) < len(train)
        helpful = [int(row) for row in np.argsort(-relative) if relative[row] > 0]
        assert [helper.id for helper in one.helpers] == [results.ids[row] for row in helpful]
        for side, rows in ((one.culprits, harmful), (one.helpers, helpful)):
            for found, expected in (("influence", influence), ("relative_influence", relative)):
                close = {"rtol": 1e-5, "atol": 1e-6 * np.abs(expected).max()}
                np.testing.assert_allclose([getattr(pair, found) for pair in side], expected[rows], **close)
    for short, whole in zip(trace(results, count=3), everything, strict=True):
        assert short.culprits == whole.culprits[:3]
        assert short.helpers == whole.helpers[:3]
        assert short.neighbours == whole.neighbours[:3]


def test_neighbours_are_the_most_similar_images(run):
    results, _, val = run
    prepared, objective, theta = follow(reopen(results), progress=False)

    def images(batches):
        with torch.no_grad():
            found = torch.cat([objective.scope.embed_images(theta, batch[0]) for batch in batches])
        return torch.nn.functional.normalize(found, dim=1)[torch.cat(list(batches.partition)).argsort()]

    (target,) = prepared.targets.values()
    cosine = images(target.batches) @ images(objective.batches).T
    for one in trace(results, val, count=7):
        row = cosine[sorted(val.values("id")).index(one.id)]
        best = row.argsort(descending=True)[:7]
        assert [neighbour.id for neighbour in one.neighbours] == [results.ids[n] for n in best]
        np.testing.assert_allclose([neighbour.similarity for neighbour in one.neighbours], row[best], atol=1e-5)


def test_what_a_mistake_retrieved_instead_is_the_nearest_of_its_batch(run):
    results, _, val = run
    prepared, _, theta = follow(reopen(results), progress=False)
    (target,) = prepared.targets.values()
    ids = prepared.target_pairs[""].ids
    expected = {}
    for rows, batch in zip(target.batches.partition, target.batches, strict=True):
        images, captions = (torch.nn.functional.normalize(side, dim=1) for side in target.scope.embed(theta, batch))
        cosine = (images @ captions.T).tolist()
        for n, row in enumerate(rows.tolist()):
            found = expected[ids[row]] = []
            for kind, line in (("caption", cosine[n]), ("image", [other[n] for other in cosine])):
                best = max(range(len(rows)), key=line.__getitem__)
                if best != n:
                    found.append((kind, ids[rows[best]], line[best], ids[row], line[n]))
    everything = trace(results, val, count=1)
    assert len(everything) == len(val)
    for one in everything:
        assert [match[:2] + match[3:4] for match in one.retrieved] == [m[:2] + m[3:4] for m in expected[one.id]]
        for match, (_, _, similarity, _, right) in zip(one.retrieved, expected[one.id], strict=True):
            assert (match.similarity, match.right_similarity) == pytest.approx((similarity, right))
            assert match.similarity > match.right_similarity
        assert bool(one.retrieved) == one.mistake
    assert {match.kind for one in everything for match in one.retrieved} == {"caption", "image"}


def test_a_run_of_before_that_was_kept_says_nothing_of_it_until_it_is_scored_again(dataset, score):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    results = score(train, val)
    before, store = trace(results), Store(*results.config.store)
    assert all(one.retrieved for one in before)
    (name,) = results.config.target["tables"].values()
    shutil.rmtree(store.table(f"{name}-matches").folder)
    assert trace(results) == [one._replace(retrieved=[]) for one in before]
    assert trace(score(train, val, overwrite=True)) == before


def test_chosen_queries(run):
    results, _, val = run
    chosen = val.values("id")[3:6]
    assert {one.id for one in trace(results, chosen)} == set(chosen)
    assert trace(results, val.select(chosen)) == trace(results, tuple(chosen))
    assert len(trace(results, val)) == len(val)
    assert trace(results, []) == []


def test_at_most_so_many_queries_the_worst(run):
    results, _, val = run
    everything, mistakes = trace(results, val), trace(results)
    assert [one.id for one in trace(results, limit=2)] == [one.id for one in mistakes[:2]]
    assert [one.id for one in trace(results, val, limit=3)] == [one.id for one in everything[:3]]
    wrong = {one.id for one in mistakes}
    assert all(one.mistake == (one.id in wrong) for one in everything)


def test_many_queries_are_traced_a_few_at_a_time(run, monkeypatch):
    results, _, val = run
    whole = trace(results, val, count=4)
    monkeypatch.setattr(tracing, "_AT_ONCE", 5)
    for a, b in zip(trace(results, val, count=4), whole, strict=True):
        assert [pair.id for pair in (*a.culprits, *a.helpers, *a.neighbours)] == [
            pair.id for pair in (*b.culprits, *b.helpers, *b.neighbours)
        ]


def test_a_trace_reads_every_part_once_and_computes_nothing_again(dataset, score, monkeypatch):
    """What keeps it within two seconds at 100,000 pairs."""
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True, batch_size=2)
    parts, read = Store(*results.config.store).table("gradients").parts(), Table._columns
    assert len(parts) > 3
    seen = []

    def spy(table, part, columns):
        seen.extend((table.folder.name, part, column) for column in columns)
        return read(table, part, columns)

    monkeypatch.setattr(Table, "_columns", spy)
    monkeypatch.delattr(GradientStore, "load")
    results = dataset.load_brain_results("ecif", cache=False)
    assert trace(results, limit=3)
    for column in ("positive", "negative", "image"):
        assert [place[1] for place in seen if place[::2] == ("gradients", column)] == parts


def test_a_run_without_effects_gets_them(run):
    results, _, _ = run
    store = Store(*results.config.store)
    before, table = trace(results), store.table("effects")
    shutil.rmtree(table.folder)
    assert trace(results) == before
    assert table.parts()


def test_tracing_does_without_torch():
    code = "import sys, fiftyone_ecif.api.tracing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thousand_targets_are_scored_from_the_store_without_the_model(run, monkeypatch):
    results, _, _ = run
    monkeypatch.setattr(OpenClipEncoder, "__init__", lambda *_: pytest.fail("a model was loaded"))
    store = Store(*results.config.store)
    (table,) = results.config.target["tables"].values()
    single = store.table(table).read_all("gradient")["gradient"].astype(float)
    weights = np.random.default_rng(0).dirichlet(np.ones(len(single)), size=1000)  # of the pairs in each target's mean
    stored = GradientStore(store, len(results.ids)).load()
    positive, negative = stored.influence(weights @ single)
    assert positive.shape == negative.shape == (1000, 72)
    solved = weights @ single @ np.linalg.inv(stored.curvature) / 72
    close = {"rtol": 1e-6, "atol": 1e-8 * np.abs(positive).max()}
    np.testing.assert_allclose(positive, solved @ stored.positive.T, **close)
    np.testing.assert_allclose(negative, solved @ stored.negative.T, **close)


def test_bad_queries(run):
    results, train, val = run
    with pytest.raises(EcifError, match=f"{train.first().id} is not in the target of run 'ecif'"):
        trace(results, [val.first().id, train.first().id])
    for name in ("count", "limit"):
        with pytest.raises(EcifError, match=f"{name}=0 must be at least 1"):
            trace(results, **{name: 0})


def test_a_run_without_gradients(dataset, score):
    results = score(dataset.match_tags("train"), dataset.match_tags("val"), fit=True, keep_gradients=False)
    with pytest.raises(EcifError, match=r"kept no gradients\. Run compute_influence with keep_gradients=True"):
        trace(results)


def test_exact_agrees_with_brute_force_and_with_the_stored_gradients(run):
    results, _, _ = run
    query = trace(results, count=1)[0].id
    (exact,) = trace(results, [query], count=1000, exact=True)
    prepared, objective, theta = follow(reopen(results), progress=False)
    (target,) = prepared.targets.values()
    row = results.target_pairs().ids.index(query)

    def loss(at):
        every = [target.batch_losses(at, rows, batch) for rows, batch in target._own()]
        return torch.cat(every)[(torch.cat(list(target.batches.partition)) == row).nonzero()[0, 0]]

    *_, solution = conjugate_gradient(lambda v: objective.hessian_product(theta, v), grad(loss)(theta), 1e-10)
    expected = np.empty(len(results.ids))
    for rows, batch in zip(objective.batches.partition, objective.batches, strict=True):
        expected[rows] = sum(batch_influence(objective.scope, theta, batch, solution.vector, len(expected), "exact"))
    found = {culprit.id: culprit.influence for culprit in exact.culprits}
    assert set(found) <= {results.ids[n] for n in np.flatnonzero(expected < 0.01 * np.abs(expected).max())}
    rows = [results.ids.index(sample) for sample in found]
    assert np.abs(expected[rows] - list(found.values())).max() < 0.01 * np.abs(expected).max()
    (stored,) = trace(results, [query], count=1000)
    rough = {culprit.id: culprit.influence for culprit in stored.culprits}
    both = sorted(found.keys() & rough.keys())
    assert len(both) > 0.8 * len(found)
    assert np.corrcoef([found[sample] for sample in both], [rough[sample] for sample in both])[0, 1] > 0.9


def test_exact_follows_the_runs_solver(dataset, score):
    train, val = dataset.match_tags("train"), dataset.match_tags("val")
    plain = score(train, val, fit=True, solver="identity")
    (exact,) = trace(plain, [val.first().id], exact=True, count=1000)
    (stored,) = trace(plain, [val.first().id], count=1000)
    rough = {culprit.id: culprit.influence for culprit in stored.culprits}
    pairs = [(culprit.influence, rough[culprit.id]) for culprit in exact.culprits if culprit.id in rough]
    assert len(pairs) > 10
    slope = np.polyfit(*np.transpose(pairs), 1)[0]
    assert 0.5 < slope < 1.5  # of the same size: no curvature in either
    other = score(train, val, fit=True, solver="logra", brain_key="other")
    with pytest.raises(EcifError, match="Leave exact out"):
        trace(other, exact=True)


def test_zero_shot_mistakes_and_slices(run, score):
    _, train, val = run
    slices = {"early": val.limit(8), "late": val.skip(8)}
    results = score(train, slices, fit=True, target_loss="zero_shot", label_field="kind", brain_key="classes")
    prepared, _, theta = follow(reopen(results), progress=False)
    wrong = {}
    for name, target in zip(slices, prepared.targets.values(), strict=True):
        ids = prepared.target_pairs[name].ids
        classes = sorted(set(val.values("kind")))
        labels = dict(zip(*val.values(["id", "kind"]), strict=True))
        chosen = [classes[place] for place in target.predictions(theta)]
        wrong |= {sample: label for sample, label in zip(ids, chosen, strict=True) if label != labels[sample]}
    assert 0 < len(wrong) < len(val)
    found = trace(results.samples._dataset.load_brain_results("classes", cache=False))
    assert {one.id for one in found} == set(wrong)
    for one in found:
        (match,) = one.retrieved
        assert (match.kind, match.found, match.right) == ("class", wrong[one.id], labels[one.id])
        assert match.similarity > match.right_similarity
    assert all(culprit.relative_influence < 0 for one in found for culprit in one.culprits)


@pytest.mark.parametrize("copied", [False, True])
def test_captions_of_one_image_are_not_held_against_each_other(copied, dataset, score, tmp_path):
    """As in COCO: the image counts as found by each of its captions."""
    val = dataset.match_tags("val")
    for number, sample in enumerate(list(val)):
        for extra in range(2):
            path = sample.filepath
            if copied:
                path = str(tmp_path / f"{number}-{extra}.png")
                shutil.copy(sample.filepath, path)
            caption = f"{sample.caption}, {'as seen' if extra else 'in a picture'}"
            dataset.add_sample(fo.Sample(path, caption=caption, tags=["more"]))
    target = dataset.match_tags(["val", "more"])
    results = score(dataset.match_tags("train"), target, batch_size=72)
    pairs = results.target_pairs()
    captions = dict(zip(*target.values(["id", "caption"]), strict=True))
    first = [captions[sample].split(",")[0] for sample in pairs.ids]  # the same for all captions of an image
    assert len(set(first)) == 24
    prepared, _, theta = follow(reopen(results), progress=False)
    (made,) = prepared.targets.values()
    (rows,), (batch,) = made.batches.partition, [made.batches[0]]
    similarity = made.scope.similarity(theta, batch).tolist()
    names = [first[row] for row in rows.tolist()]
    for place, row in enumerate(rows.tolist()):
        across = max(range(72), key=lambda k, place=place: similarity[place][k])
        down = max(range(72), key=lambda k, place=place: similarity[k][place])
        wrong = names[across] != names[place] or names[down] != names[place]
        assert pairs.mistakes[row] == wrong
    assert 0 < pairs.mistakes.sum() < 72
    found = trace(results)
    assert len(found) == pairs.mistakes.sum()
    own = dict(zip(pairs.ids, first, strict=True))
    for one in found:
        assert one.retrieved
        assert all(own[match.found] != own[one.id] == own[match.right] for match in one.retrieved)
