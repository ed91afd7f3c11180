"""The whole job on a real FiftyOne dataset: fields, runs, cache, and every kind of bad input."""

import logging
import os
from pathlib import Path

import fiftyone as fo
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse.linalg import LinearOperator, minres

from fiftyone_ecif import EcifError, InfluenceResults
from fiftyone_ecif.influence.heads import FeatureBatches
from fiftyone_ecif.influence.objective import ContrastiveLoss, random_partition
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.store.files import cache_folder
from fiftyone_ecif.store.tables import Store

FIELDS = ["ecif_influence", "ecif_positive", "ecif_negative", "ecif_rank"]


@pytest.fixture
def encoded(monkeypatch):
    """Counts what the encoder is asked to encode."""
    counts = {"image": 0, "text": 0}
    original = OpenClipEncoder.features

    def spy(self, tower, inputs):
        counts[tower] += len(inputs)
        return original(self, tower, inputs)

    monkeypatch.setattr(OpenClipEncoder, "features", spy)
    return counts


def split(dataset):
    return dataset.match_tags("train"), dataset.match_tags("val")


def test_fields_run_and_diagnostics(dataset, score):
    train, val = split(dataset)
    results = score(train, val, fit=True)
    assert isinstance(results, InfluenceResults)
    influence, positive, negative, rank = (train.values(field) for field in FIELDS)
    np.testing.assert_allclose(influence, np.add(positive, negative), rtol=1e-12)
    assert np.isfinite(influence).all()
    assert sorted(rank) == list(range(1, len(train) + 1))
    assert train.sort_by("ecif_influence").values("ecif_rank") == list(range(1, len(train) + 1))
    assert val.values("ecif_influence") == [None] * len(val)
    assert all(dataset.get_field(field).description for field in FIELDS)
    assert set(FIELDS) <= {index.split(".")[0] for index in dataset.list_indexes()}

    assert dataset.list_brain_runs(type="influence", method="ecif") == ["ecif"]
    loaded = dataset.load_brain_results("ecif")
    assert loaded.ids == results.ids == sorted(train.values("id"))
    assert loaded.diagnostics == results.diagnostics
    assert loaded.diagnostics["pairs"] == len(train)
    assert loaded.diagnostics["relative_gradient_norm"] <= 1e-5
    assert loaded.diagnostics["solve_residual"] <= 1e-6
    assert loaded.diagnostics["attributed"] == [
        "visual.attnpool.c_proj.weight",
        "visual.attnpool.c_proj.bias",
        "text_projection",
    ]
    config = dataset.get_brain_info("ecif").config
    assert (config.caption_field, config.scope, config.fit, config.batch_size) == ("caption", "heads", True, 24)
    assert set(dataset.load_brain_view("ecif").values("id")) == set(train.values("id"))


def test_scores_equal_a_plain_computation(dataset, score, made):
    """Everything once more from the images, a removal gradient for each pair, and SciPy's MINRES."""
    train, val = split(dataset)
    train, val = train.limit(20), val.limit(12)
    results = score(train, val, batch_size=10, proximal=1.0, seed=4)
    assert results.diagnostics["damping"] == 0
    encoder = OpenClipEncoder("ecif-digits", made[1], "cpu")
    scope = encoder.scope(parse_scope("heads"))

    def features(view):
        paths, captions = view.sort_by("id").values(["filepath", "caption"])
        ((_, images, _),) = encoder.image_features(paths, 64, 0)
        (texts,) = encoder.text_features(captions, 64)
        return images.double(), texts.double()

    images, texts = features(train)
    partition = random_partition(20, 10, seed=4)
    objective = ContrastiveLoss(scope, FeatureBatches(images, texts, partition), 20, 1.0)
    target = ContrastiveLoss(scope, FeatureBatches(*features(val), random_partition(12, 10, 4)), 12)
    gradient, _ = target.gradient_and_value(scope.start)

    def removal_gradient(n):
        batch = next(rows for rows in partition if n in rows)
        rest = batch[batch != n]
        total = ContrastiveLoss(scope, FeatureBatches(images, texts, [batch]), 1)
        without = ContrastiveLoss(scope, FeatureBatches(images, texts, [rest]), 1)
        return total.gradient_and_value(scope.start)[0] - without.gradient_and_value(scope.start)[0]

    hessian = LinearOperator(  # another solver altogether
        (len(gradient),) * 2,
        matvec=lambda v: objective.hessian_product(scope.start, torch.from_numpy(v)).numpy(),
        dtype=float,
    )
    solution = torch.from_numpy(minres(hessian, gradient.numpy(), rtol=1e-10)[0])
    expected = [(removal_gradient(n).dot(solution) / 20).item() for n in range(20)]
    np.testing.assert_allclose(train.sort_by("id").values("ecif_influence"), expected, rtol=1e-3, atol=1e-7)


def test_the_same_call_gives_the_same_numbers(dataset, score):
    train, val = split(dataset)
    score(train, val)
    score(train.sort_by("caption"), val.sort_by("caption"), brain_key="again")
    assert train.values("ecif_influence") == train.values("again_influence")


def test_a_second_target_runs_no_encoder(dataset, score, encoded):
    train, val = split(dataset)
    score(train, val)
    assert encoded == {"image": len(dataset), "text": len(dataset)}
    score(train, val.limit(12), brain_key="slice")
    score(train, train.limit(10), brain_key="own")
    score(train, val, brain_key="other_partition", seed=9)
    assert encoded == {"image": len(dataset), "text": len(dataset)}
    assert train.values("slice_influence") != train.values("ecif_influence")
    stores = [dataset.get_brain_info(key).config.store for key in ("ecif", "slice", "own", "other_partition")]
    assert stores[0] == stores[1] == stores[2] != stores[3]


def test_changes_are_noticed(dataset, score, encoded, tmp_path):
    train, val = split(dataset)
    first = train.first()
    path = tmp_path / "copy.png"
    path.write_bytes(Path(first.filepath).read_bytes())
    first.filepath = str(path)
    first.save()
    score(train, val)
    encoded.update(image=0, text=0)
    before = dict(zip(*train.values(["id", "ecif_influence"]), strict=True))

    first.caption = "a green nine above a red one"
    first.save()
    score(train, val, overwrite=True)
    assert encoded == {"image": 0, "text": 1}
    assert before != dict(zip(*train.values(["id", "ecif_influence"]), strict=True))

    Image.effect_noise((96, 96), 80).convert("RGB").save(path)
    score(train, val, overwrite=True)
    assert encoded == {"image": 1, "text": 1}


def test_another_model_is_noticed(dataset, score, encoded, made, tmp_path):
    train, val = split(dataset)
    score(train, val)
    weights = torch.load(made[1], weights_only=True)
    weights["text_projection"] = weights["text_projection"] + 0.01
    torch.save(weights, tmp_path / "other.pt")
    score(train, val, pretrained=str(tmp_path / "other.pt"), brain_key="other")
    assert encoded == {"image": 2 * len(dataset), "text": 2 * len(dataset)}


def test_gradients_are_kept_apart_and_give_self_influence(dataset, score):
    train, val = split(dataset)
    results = score(train, val)
    cached = results.cached()
    positive, negative = cached.positive, cached.negative
    assert positive.shape == negative.shape == (len(train), 2 * 16 * 16)
    assert not np.allclose(positive, negative)
    assert (results.self_influence() > 0).all()
    assert np.abs(results.clip_score()).max() <= 1
    table = Store(*dataset.get_brain_info("ecif").config.store).table("gradients")
    found = table.read_all("row", "batch")
    assert sorted(found["row"]) == list(range(len(train)))
    assert np.bincount(found["batch"]).tolist() == [24, 24, 24]


def test_deleting_a_run_takes_fields_and_cache_along(dataset, score):
    train, val = split(dataset)
    score(train, val)
    score(train, val.limit(12), brain_key="slice")
    store = Store(*dataset.get_brain_info("ecif").config.store)
    dataset.delete_brain_run("ecif")
    assert not dataset.has_sample_field("ecif_influence")
    assert train.count("slice_influence") == len(train)
    assert store.folder.exists()  # the other run still uses it
    dataset.delete_brain_run("slice")
    assert not store.folder.exists()
    assert not list(cache_folder().glob(f"*/{store.names[0]}"))
    assert not [field for field in dataset.get_field_schema() if field.endswith(("_influence", "_rank"))]


def test_renaming_a_run_renames_its_fields(dataset, score):
    train, val = split(dataset)
    score(train, val)
    before = train.values("ecif_influence")
    dataset.rename_brain_run("ecif", "better")
    assert train.values("better_influence") == before
    assert "valuable" in dataset.get_field("better_influence").description
    dataset.delete_brain_run("better")
    assert not dataset.has_sample_field("better_influence")


def test_deleting_a_clones_run_leaves_the_originals_cache(dataset, score):
    train, val = split(dataset)
    results = score(train, val)
    clone = dataset.clone()
    clone.delete_brain_run("ecif")
    clone.delete()
    assert len(results.clip_score()) == len(train)


def test_deleting_a_run_leaves_a_field_of_the_users(dataset, score):
    train, val = split(dataset)
    score(train, val)
    dataset.delete_sample_field("ecif_rank")
    dataset.add_sample_field("ecif_rank", fo.IntField)
    dataset.delete_brain_run("ecif")
    assert dataset.has_sample_field("ecif_rank")
    assert not dataset.has_sample_field("ecif_influence")


def test_a_sample_that_a_view_repeats_is_one_pair(dataset, score):
    train, val = split(dataset)
    score(train, val, brain_key="plain")
    repeated = train.limit(50).concat(train.skip(20))
    assert len(repeated) == 102
    results = score(repeated, val.concat(val.limit(5)))
    assert results.ids == sorted(train.values("id"))
    assert results.diagnostics["target_pairs"] == results.config.target["samples"] == len(val)
    assert train.values("ecif_influence") == train.values("plain_influence")
    assert train.values("ecif_rank") == train.values("plain_rank")


def test_a_view_run_and_overwriting(dataset, score):
    train, val = split(dataset)
    score(train.limit(30), val)
    assert dataset.count("ecif_influence") == 30
    score(train.skip(30), val, brain_key="rest")
    assert dataset.count("ecif_influence") == 30
    store = dataset.get_brain_info("ecif").config.store
    score(train.skip(40), val, overwrite=True)
    assert set(dataset.exists("ecif_influence").values("id")) == set(train.skip(40).values("id"))
    assert not Store(*store).folder.exists()


def test_pairs_that_cannot_be_scored_cost_only_themselves(dataset, score, tmp_path, caplog):
    train, val = split(dataset)
    empty, missing, broken = train.limit(3)
    empty.caption = "  "
    missing.filepath = str(tmp_path / "gone.png")
    broken.filepath = str(tmp_path / "broken.png")
    Path(broken.filepath).write_bytes(b"\x89PNG no image")
    for sample in (empty, missing, broken):
        sample.save()
    with caplog.at_level(logging.WARNING):
        results = score(train, val)
    assert set(results.skipped) == {empty.id, missing.id, broken.id}
    assert "Skipped 3 training samples" in caplog.text
    assert results.skipped[missing.id].startswith("image: there is no file")
    assert dataset[empty.id].ecif_influence is None
    assert dataset.count("ecif_influence") == len(train) - 3


def test_progress_is_reported(dataset, score):
    train, val = split(dataset)
    seen = []
    score(train, val, progress=lambda bar: seen.append(bar.iteration))
    assert len(seen) > 10


def test_target_pairs_among_the_training_pairs_are_warned_of(dataset, score, caplog):
    with caplog.at_level(logging.WARNING):
        results = score(dataset, dataset.match_tags("val"))
    assert "24 of the 24 target pairs are also scored" in caplog.text
    assert results.diagnostics["shared_pairs"] == 24


@pytest.mark.parametrize("batch_size", [72, 24])
def test_a_fitted_model_is_seen_to_be_stationary(dataset, score, made, tmp_path, batch_size):
    """The heads that fit found, saved and scored as they are."""
    train, val = split(dataset)
    score(train, val, fit=True, batch_size=batch_size, proximal=0.1)
    store = Store(*dataset.get_brain_info("ecif").config.store)
    theta = torch.from_numpy(store.table("parameters").read("0", "theta")["theta"][0]).float()
    weights = torch.load(made[1], weights_only=True)
    image, text = weights["visual.attnpool.c_proj.weight"], weights["text_projection"]
    fitted = theta[: theta.numel() - text.numel()].view(-1, image.shape[0])
    weights["visual.attnpool.c_proj.weight"] = fitted[:-1].T.contiguous()
    weights["visual.attnpool.c_proj.bias"] = fitted[-1]
    weights["text_projection"] = theta[-text.numel() :].view(text.shape)
    torch.save(weights, tmp_path / "fitted.pt")
    options = {"batch_size": batch_size, "proximal": 1e-6, "brain_key": "moved", "fit": False}
    before = score(train, val, **options).diagnostics["relative_gradient_norm"]
    options["pretrained"] = str(tmp_path / "fitted.pt")
    after = score(train, val, overwrite=True, **options).diagnostics["relative_gradient_norm"]
    assert after < 0.8 * before


def test_a_model_far_from_stationary_is_warned_of(dataset, score, caplog):
    with caplog.at_level(logging.WARNING):
        results = score(*split(dataset), proximal=0.01)
    assert results.diagnostics["relative_gradient_norm"] > 0.01
    assert "not at a stationary point" in caplog.text
    assert results.diagnostics["damping"] > 0
    assert "curvature is negative in places, so it was damped" in caplog.text


# One row for each kind of bad input: what is done to the dataset, the options, the message.
def _first(field, value):
    return lambda dataset: dataset.limit(1).set_field(field, value).save()


BAD = {
    "no such caption field": (None, {"caption_field": "captoin"}, r"no field 'captoin'. String fields .*caption"),
    "captions are no text": (
        lambda d: d.add_sample_field("n", fo.IntField),
        {"caption_field": "n"},
        "is a IntField",
    ),
    "an empty caption": (
        lambda d: d.limit(1).set_field("caption", "").save(),
        {"skip_failures": False},
        "caption: empty",
    ),
    "all captions empty": (lambda d: d.set_field("caption", None).save(), {}, "None of the 72 samples"),
    "a missing image": (
        lambda d: d.limit(1).set_field("filepath", "/no.png").save(),
        {"skip_failures": False},
        "no file",
    ),
    "a broken image": (
        _first("filepath", __file__),
        {"skip_failures": False},
        "cannot be scored .image: cannot identify",
    ),
    "a batch larger than the dataset": (None, {"batch_size": 73}, "batch_size=73 is larger than the 72"),
    "a batch of one": (None, {"batch_size": 1}, "no negatives"),
    "no such model": (None, {"model": "ViT-B-23"}, "no model 'ViT-B-23'"),
    "no weights": (None, {"pretrained": None}, "pretrained is needed"),
    "no such checkpoint": (None, {"pretrained": "gone.pt"}, "neither a file nor a tag"),
    "a key that is no name": (None, {"brain_key": "my key"}, "not a name"),
    "a field of the user's": (lambda d: d.add_sample_field("ecif_influence", fo.FloatField), {}, "which no run wrote"),
    "no such scope": (None, {"scope": "everything"}, "scope='everything'"),
    "a regulariser of zero": (None, {"proximal": 0}, "positive number"),
    "a seed that is no number": (None, {"seed": None}, "seed=None must be a whole number"),
    "no GPU": (None, {"device": "cuda:0"}, "no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_any_work(case, dataset, score, encoded):
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    spoil, options, message = BAD[case]
    if spoil:
        spoil(dataset)
    fields = set(dataset.get_field_schema())
    with pytest.raises(EcifError, match=message):
        score(*split(dataset), **options)
    assert encoded == {"image": 0, "text": 0}
    assert set(dataset.get_field_schema()) == fields
    assert dataset.list_brain_runs() == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda d: d.match_tags("nobody"), "target cannot be used. The view has no samples"),
        (lambda d: d.limit(1), "target needs at least 2 pairs"),
        (lambda d: None, "target is needed"),
        (lambda d: "val", "dataset or view is needed, got str"),
    ],
)
def test_bad_targets(target, message, dataset, score):
    with pytest.raises(EcifError, match=message):
        score(dataset.match_tags("train"), target(dataset))


def test_a_taken_key_keeps_the_run_that_has_it(dataset, score):
    train, val = split(dataset)
    score(train, val)
    before = train.values("ecif_influence")
    with pytest.raises(EcifError, match="'ecif' is taken"):
        score(train.limit(30), val)
    assert train.values("ecif_influence") == before


def test_a_cache_folder_that_cannot_be_written(dataset, score, encoded, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(blocked / "cache"))
    with pytest.raises(EcifError, match=r"cannot be written .*FIFTYONE_ECIF_CACHE_DIR"):
        score(*split(dataset))
    assert encoded == {"image": 0, "text": 0}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_folder(dataset, score, tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FIFTYONE_ECIF_CACHE_DIR", str(tmp_path))
    with pytest.raises(EcifError, match="cannot be written"):
        score(*split(dataset))


def test_collections_that_are_not_of_images(score, made):
    empty, grouped = fo.Dataset(), fo.Dataset()
    grouped.add_group_field("group", default="left")
    group = fo.Group()
    grouped.add_sample(fo.Sample(made[0].first().filepath, caption="x", group=group.element("left")))
    for samples, message in ((empty, "no samples"), (grouped, "Choose a slice")):
        with pytest.raises(EcifError, match=message):
            score(samples, made[0])
        samples.delete()


def test_a_run_that_is_stopped_resumes(dataset, made, encoded, monkeypatch):
    """Closing the job in the middle of encoding loses nothing that was written."""
    from fiftyone_ecif.api.influence import influence_steps
    from fiftyone_ecif.api.progress_bar import follow
    from fiftyone_ecif.models import features
    from fiftyone_ecif.models.dual_encoder import DualEncoder
    from fiftyone_ecif.settings.influence import InfluenceSettings
    from fiftyone_ecif.settings.job import JobSettings

    def job():
        settings = InfluenceSettings(model="ecif-digits", pretrained=made[1], batch_size=24)
        return influence_steps(*split(dataset), settings, JobSettings(num_workers=0))

    monkeypatch.setattr(features, "_PART", 16)
    monkeypatch.setattr(DualEncoder, "batch_size", 16)
    work = job()
    for step in work:
        if step.stage == "Encoding images" and step.done == 48:
            break
    work.close()
    assert dataset.list_brain_runs() == []
    results = follow(job(), progress=False)
    assert len(results.ids) == 72
    assert encoded["image"] == len(dataset)  # what was encoded before it was stopped is not encoded again
