"""Embeddings in place of a model: the same numbers as from the model that made them, and bad ones."""

from types import SimpleNamespace

import fiftyone as fo
import fiftyone.operators as foo
import fiftyone.operators.types as types
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fiftyone_ecif import EcifError, compute_influence, compute_misalignment, edit_model, group_influence, trace
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import training
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.settings.influence import InfluenceSettings
from operators.model_input import ask_embeddings

FIELDS = ("of_image", "of_caption")


@pytest.fixture
def vectors(dataset, made):
    """The demo model's embeddings of all pairs, in two fields and as arrays, and its scale."""
    encoder = OpenClipEncoder(training.MODEL, made[1], "cpu")
    ((_, images, _),) = encoder.image_features(dataset.values("filepath"), 1000, 0)
    (captions,) = encoder.text_features(dataset.values("caption"), 1000)
    scope = encoder.scope(parse_scope("heads"))
    found = [part.float().numpy() for part in scope.embed(scope.start, (images.double(), captions.double()))]
    for field, rows in zip(FIELDS, found, strict=True):
        dataset.set_values(field, list(rows))
    return found, float(scope.scale(scope.start))


def parts(dataset):
    return dataset.match_tags("train"), dataset.match_tags("val")


def test_influence_is_that_of_maps_behind_them(dataset, vectors):
    """By hand: one pair taken out of its batch, with the gradient and the Hessian of plain autograd."""
    (images, captions), scale = [side[:, :6] for side in vectors[0]], 4.0  # few numbers, so that it takes no time
    train, val = parts(dataset)
    given = {"embeddings": (images, captions), "scale": scale, "proximal": 20.0, "num_workers": 0}
    results = compute_influence(train, target=val, batch_size=len(train), **given)
    place = {sample: row for row, sample in enumerate(dataset.values("id"))}
    rows = [
        [torch.from_numpy(side[[place[each] for each in ids]]).double() for side in (images, captions)]
        for ids in (results.ids, results.target_ids[""])
    ]
    size = images.shape[1]

    def losses(theta, batch):
        maps = theta.view(2, size, size)
        u, v = (torch.nn.functional.normalize(x @ w, dim=1) for x, w in zip(batch, maps, strict=True))
        logits = scale * u @ v.T
        return torch.logsumexp(logits, 0) + torch.logsumexp(logits, 1) - 2 * logits.diagonal()

    start = torch.eye(size, dtype=torch.float64).repeat(2, 1, 1).flatten()
    assert results.diagnostics["parameters"] == len(start)
    assert results.diagnostics["training_loss"] == pytest.approx(losses(start, rows[0]).mean().item())
    assert results.diagnostics["damping"] == 0
    number = len(results.ids)
    product = lambda v: torch.func.jvp(  # noqa: E731
        torch.func.grad(lambda at: losses(at, rows[0]).sum() / number + 10 * (at - start).square().sum()),
        (start,),
        (v,),
    )[1]
    hessian = torch.stack([product(row) for row in torch.eye(len(start), dtype=torch.float64)])
    gradient = torch.func.grad(lambda at: losses(at, rows[1]).mean())(start)
    solution = torch.linalg.solve(hessian, gradient)
    scores = dict(zip(*dataset.values(["id", "ecif_influence"]), strict=True))
    for pair in (0, 7, 30):
        keep = [row for row in range(number) if row != pair]
        removal = torch.func.grad(
            lambda at, keep=keep: losses(at, rows[0]).sum() - losses(at, [side[keep] for side in rows[0]]).sum()
        )(start)
        expected = (solution @ removal / number).item()
        assert scores[results.ids[pair]] == pytest.approx(expected, rel=1e-5)


def test_fields_and_arrays_give_the_same(dataset, vectors):
    arrays, scale = vectors
    train, val = parts(dataset)
    options = {"scale": scale, "batch_size": 24, "fit": True, "num_workers": 0}
    compute_influence(train, target=val, embeddings=FIELDS, brain_key="fields", **options)
    of_dataset = compute_influence(train, target=val, embeddings=arrays, brain_key="arrays", **options)
    first, second = (np.array(train.values(f"{key}_influence")) for key in ("fields", "arrays"))
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
    assert dataset.load_brain_results("fields").config.model == "embeddings"
    assert dataset.load_brain_results("fields").config.embeddings == FIELDS
    compute_influence(
        train, target=train, embeddings=[side[: len(train)] for side in arrays], brain_key="own", **options
    )
    with pytest.raises(EcifError, match="arrays of embeddings, which are not kept"):
        edit_model(of_dataset, of_dataset.ids[:2], "unused.pt")


def test_what_a_trace_finds_is_stored(dataset, vectors):
    train, val = parts(dataset)
    results = compute_influence(train, target=val, embeddings=FIELDS, scale=vectors[1], fit=True, num_workers=0)
    found = trace(results, val.limit(3))
    assert found


def test_detection_ranks_as_with_the_model(dataset, vectors, made):
    train, _ = parts(dataset)
    given = {"embeddings": FIELDS, "scale": vectors[1], "num_workers": 0}
    audit = compute_misalignment(train, brain_key="all", **given)
    assert audit.config.model == "embeddings"
    assert audit.diagnostics["detectors"]
    assert np.isfinite(train.values("all_misalignment")).all()

    compute_misalignment(train, detector="clip_score", fit=False, **given)
    model = {"model": training.MODEL, "pretrained": made[1], "num_workers": 0}
    compute_misalignment(train, brain_key="model", detector="clip_score", fit=False, **model)
    np.testing.assert_array_equal(train.values("audit_misalignment"), train.values("model_misalignment"))


def test_samples_without_an_embedding_are_skipped(dataset, vectors):
    train, val = parts(dataset)
    first, second, third = train.limit(3)
    first["of_image"] = None
    second["of_caption"] = np.zeros_like(second["of_caption"])
    third["of_image"] = np.full_like(third["of_image"], np.nan)
    for sample in (first, second, third):
        sample.save()
    options = {"embeddings": FIELDS, "scale": vectors[1], "num_workers": 0}
    results = compute_influence(train, target=val, **options)
    assert set(results.skipped) == {first.id, second.id, third.id}
    assert "no image embedding" in results.skipped[first.id]
    assert "caption embedding is zero" in results.skipped[second.id]
    assert train.count("ecif_influence") == len(train) - 3
    with pytest.raises(EcifError, match=f"Sample {first.id} cannot be used: it has no image embedding"):
        compute_influence(train, target=val, brain_key="strict", skip_failures=False, **options)


BAD = {
    "one field": ({"embeddings": ("of_image",)}, "must be two"),
    "no such field": ({"embeddings": ("of_image", "nowhere")}, "There is no field 'nowhere'"),
    "weights too": ({"embeddings": FIELDS, "pretrained": "openai"}, "Leave pretrained out"),
    "a deeper scope": ({"embeddings": FIELDS, "scope": "blocks:1"}, "Use scope='heads'"),
    "prompts": ({"embeddings": FIELDS, "target_loss": "zero_shot", "label_field": "spoiled"}, "encodes prompts"),
    "too few rows": ({"embeddings": (np.ones((3, 4)), np.ones((3, 4)))}, "3 rows for"),
    "unlike rows": ({"embeddings": (np.ones((3, 4)), np.ones((2, 4)))}, "a row for each sample"),
    "no numbers": ({"embeddings": (np.ones((3, 4)), [["a"]])}, "two arrays of numbers"),
    "no scale": ({"embeddings": FIELDS, "scale": 0}, "scale=0 must be a positive number"),
    "unlike sizes": ({"embeddings": ("of_image", "short")}, "can be compared"),
    "no vectors": ({"embeddings": ("of_image", "empty")}, "No sample has a usable caption embedding"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_embeddings_are_refused(name, dataset, vectors):
    train, val = parts(dataset)
    dataset.add_sample_field("empty", fo.VectorField)
    dataset.set_values("short", [np.ones(3)] * len(dataset))
    options, message = BAD[name]
    with pytest.raises(EcifError, match=message):
        compute_influence(train, target=val, num_workers=0, **options)
    assert not dataset.list_brain_runs()


def test_there_is_no_model_to_edit(dataset, vectors, tmp_path):
    train, val = parts(dataset)
    results = compute_influence(train, target=val, embeddings=FIELDS, scale=vectors[1], num_workers=0)
    with pytest.raises(EcifError, match=r"of embeddings, so there is no model .* Use a run of a model"):
        edit_model(results, results.ids[:2], str(tmp_path / "edited.pt"))


def test_changed_embeddings_are_noticed(dataset, vectors):
    train, val = parts(dataset)
    results = compute_influence(train, target=val, embeddings=FIELDS, scale=vectors[1], num_workers=0)
    assert np.isfinite(group_influence(results, results.ids[:3])[0])
    dataset.set_values("of_image", list(vectors[0][0] + 0.1))
    with pytest.raises(EcifError, match="changed since"):
        group_influence(results, results.ids[:3])


def test_the_shell_and_the_app_take_fields(dataset, vectors):
    train, val = parts(dataset)
    compute_influence(train, target=val, embeddings=FIELDS, scale=5.0, num_workers=0)
    expected = train.values("ecif_influence")
    dataset.name, dataset.persistent = "given-embeddings", True
    flags = ["--embedding", FIELDS[0], "--embedding", FIELDS[1], "--scale", "5"]
    for command in (["score", "--target-tag", "val", "--key", "shell"], ["misalignment", "--key", "shell_audit"]):
        done = CliRunner().invoke(main, [command[0], dataset.name, *command[1:], "--tag", "train", *flags])
        assert done.exit_code == 0, done.output
    dataset.reload()
    train, _ = parts(dataset)
    assert train.values("shell_influence") == expected
    assert train.count("shell_audit_misalignment") == len(train)

    entered = {"own_embeddings": True, "image_embeddings": FIELDS[0], "caption_embeddings": FIELDS[1], "scale": 5.0}
    operator = foo.get_operator("@ecif/fiftyone-ecif/compute_influence")
    operator(train, target="tag: val", brain_key="app", **entered)
    assert train.values("app_influence") == expected
    foo.get_operator("@ecif/fiftyone-ecif/detect_misalignment")(train, brain_key="app_audit", **entered)
    assert train.values("app_audit_misalignment") == train.values("shell_audit_misalignment")


def test_the_form_offers_fields_of_embeddings(dataset, vectors):
    def form(**params):
        inputs = types.Object()
        asked = ask_embeddings(inputs, SimpleNamespace(params=params, dataset=dataset), InfluenceSettings)
        return asked, inputs.properties

    asked, properties = form()
    assert (asked, set(properties)) == (False, {"own_embeddings"})
    asked, properties = form(own_embeddings=True)
    assert asked
    assert set(properties) == {"own_embeddings", "image_embeddings", "caption_embeddings", "scale"}
    assert {choice.value for choice in properties["image_embeddings"].view.choices} == set(FIELDS)
    assert "one_field" in form(own_embeddings=True, image_embeddings="of_image", caption_embeddings="of_image")[1]
    for field in FIELDS:
        dataset.delete_sample_field(field)
    assert form() == (False, {})
