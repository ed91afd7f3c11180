"""Fine-tuning: the loss, the checkpoint, going on after a stop, refusals."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fiftyone_ecif import fit_model
from fiftyone_ecif.api import fine_tuning as api
from fiftyone_ecif.api.fine_tuning import fit_steps
from fiftyone_ecif.cli.main import main
from fiftyone_ecif.demo import training
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models import fine_tuning
from fiftyone_ecif.models.entered_batches import EnteredBatches
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.settings.fine_tuning import FitSettings

PAIRS, BATCH, EPOCHS = 30, 10, 3
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "init_logit_bias": -10,
}


@pytest.fixture(scope="module")
def pairs(made):
    return made[0].match_tags("train").sort_by("id")[:PAIRS]


@pytest.fixture(scope="module")
def options(made):
    """What the fits here have in common."""
    return {
        "model": training.MODEL,
        "pretrained": made[1],
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "learning_rate": 3e-3,
    }


@pytest.fixture(scope="module")
def tuned(pairs, options, tmp_path_factory):
    """The result of a fit that nothing interrupted."""
    return fit_model(pairs, tmp_path_factory.mktemp("tuned") / "model.pt", device="cpu", **options)


@pytest.fixture
def stop(options, tmp_path, monkeypatch):
    """Stops a fit that saves its state after each step, and gives its path."""

    def run(samples, step, **given):
        monkeypatch.setattr(fine_tuning, "_SAVE_EVERY", 0)
        path = tmp_path / "stopped.pt"
        work = fit_steps(samples, path, FitSettings(**(options | given)), device="cpu")
        assert ("Fine-tuning", step) in (now[:2] for now in work)
        work.close()
        return path

    return run


def weights(path):
    return torch.load(path, weights_only=True)


def changed(before, after):
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def inputs(encoder, samples):
    """Pixels and tokens of all pairs."""
    paths, captions = samples.values(["filepath", "caption"])
    return encoder.finish(torch.stack([encoder.preprocess(Image.open(path)) for path in paths])), encoder.tokenizer(
        captions
    )


def first_step(work, without=()):
    """The step that the training starts at, after none of some stages; ends the work."""
    for now in work:
        assert now.stage not in without
        if now.stage == "Fine-tuning":
            work.close()
            return now.done


def test_the_loss_goes_down_and_is_open_clips_own(tuned, pairs, options):
    assert (tuned["pairs"], tuned["steps"], tuned["skipped"]) == (PAIRS, 9, {})
    assert tuned["loss_after"] < 0.9 * tuned["loss_before"]
    for name, checkpoint in (("loss_before", options["pretrained"]), ("loss_after", tuned["checkpoint"])):
        encoder = OpenClipEncoder(training.MODEL, checkpoint, "cpu")
        pixels, tokens = inputs(encoder, pairs)
        losses = []
        for rows in random_partition(PAIRS, BATCH, seed=0):
            with torch.no_grad():
                image, text, scale = encoder.model(pixels[rows], tokens[rows])[:3]
            losses.append(2 * open_clip.ClipLoss()(image, text, scale).item())
        assert sum(losses) / len(losses) == pytest.approx(tuned[name], rel=1e-4)


def test_the_checkpoint_is_the_tuned_model_and_a_scope_starts_at_its_adapters(tuned, pairs, options):
    before, after = weights(options["pretrained"]), weights(tuned["checkpoint"])
    assert changed(before, after) == set(tuned["attributed"])
    assert {"visual.attnpool.q_proj.weight", "transformer.resblocks.1.attn.in_proj_weight"} <= set(tuned["attributed"])

    encoder = OpenClipEncoder(training.MODEL, tuned["checkpoint"], "cpu")
    scope = encoder.scope(parse_scope("lora"), seed=5)
    assert len(scope.start) == tuned["parameters"]
    pixels, tokens = inputs(encoder, pairs[:8])
    model = open_clip.create_model(training.MODEL, pretrained=tuned["checkpoint"]).eval()
    with torch.no_grad():
        image, text, scale = model(pixels, tokens)[:3]
        similarity = scope.similarity(scope.start, (pixels, tokens))
    torch.testing.assert_close(similarity, scale * image @ text.T, rtol=1e-4, atol=1e-4)

    adapters = scope.adapters(scope.start)
    assert all(b.abs().max() > 1e-4 for _, b in adapters.values())
    without = torch.cat([part.flatten() for a, b in adapters.values() for part in (a, torch.zeros_like(b))])
    for name, value in scope.parameters(without).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [1, 5])
def test_a_fit_that_was_stopped_goes_on_to_the_same_numbers(step, stop, tuned, pairs, options):
    path = stop(pairs, step)
    assert [file.name for file in path.parent.iterdir()] == ["stopped.pt.resume"]
    again = fit_steps(pairs, path, FitSettings(**options), device="cpu")
    assert first_step(again, without=["Reading images", "Measuring the loss"]) == step
    result = fit_model(pairs, path, device="cpu", **options)
    assert result == tuned | {"checkpoint": str(path)}
    assert not changed(weights(tuned["checkpoint"]), weights(path))
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "stopped.pt",
        "stopped.pt.adapters",
        "stopped.pt.preprocessing.json",
    ]


def test_each_epoch_has_batches_of_its_own_and_so_has_each_seed(pairs, options, tmp_path, monkeypatch):
    orders = []
    regrouped = EnteredBatches.regrouped
    monkeypatch.setattr(
        EnteredBatches,
        "regrouped",
        lambda batches, partition: orders.append(torch.cat(partition).tolist()) or regrouped(batches, partition),
    )
    results = [
        fit_model(pairs, tmp_path / f"{number}.pt", device="cpu", **(options | {"epochs": 2, "seed": seed}))
        for number, seed in enumerate((1, 2))
    ]
    assert all(sorted(order) == list(range(PAIRS)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert results[0]["loss_after"] != results[1]["loss_after"]


def test_a_saved_state_of_another_fit_is_refused_or_replaced(stop, dataset, options):
    samples = dataset.match_tags("train").sort_by("id")[:PAIRS]
    path = stop(samples, 1)
    settings = FitSettings(**options)
    other = r"stopped\.pt\.resume is of a fit with other settings, pairs or weights\. Delete it, or set overwrite=True"
    for name, value in (("learning_rate", 1e-4), ("epochs", 4), ("scope", "lora:2"), ("seed", 1)):
        with pytest.raises(EcifError, match=other):
            first_step(fit_steps(samples, path, replace(settings, **{name: value}), device="cpu"))
    with pytest.raises(EcifError, match=other):
        first_step(fit_steps(samples[1:], path, settings, device="cpu"))
    first = samples.first()
    first["caption"] = "something else"
    first.save()
    with pytest.raises(EcifError, match=other):
        first_step(fit_steps(samples, path, settings, device="cpu"))
    assert first_step(fit_steps(samples, path, settings, device="cpu", overwrite=True)) == 0

    path.with_name("stopped.pt.resume").write_bytes(b"damaged")
    with pytest.raises(EcifError, match=r"stopped\.pt\.resume is damaged .*Delete it, or set overwrite=True"):
        first_step(fit_steps(samples, path, settings, device="cpu"))


@pytest.mark.parametrize("change", ["moved", "touched"])
def test_a_fit_goes_on_where_its_images_were_moved(change, stop, tuned, dataset, options, tmp_path):
    """To the same numbers."""
    samples = dataset.match_tags("train").sort_by("id")[:PAIRS]
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
    for sample in samples.iter_samples(autosave=True):
        sample.filepath = str(shutil.copy(sample.filepath, tmp_path / "before"))
    path = stop(samples, 3)
    for sample in samples.iter_samples(autosave=True):
        if change == "moved":
            sample.filepath = str(shutil.move(sample.filepath, tmp_path / "after"))
        else:
            os.utime(sample.filepath, ns=(0, 10**18))
    assert first_step(fit_steps(samples, path, FitSettings(**options), device="cpu")) == 3
    fit_model(samples, path, device="cpu", **options)
    assert not changed(weights(path), weights(tuned["checkpoint"]))


def test_a_fit_does_not_go_on_with_other_bytes(stop, dataset, options, tmp_path):
    samples = dataset.match_tags("train").sort_by("id")[:PAIRS]
    path = stop(samples, 1)
    first = samples.first()
    first.filepath = shutil.copy(samples.last().filepath, str(tmp_path / "other.png"))
    first.save()
    with pytest.raises(EcifError, match="is of a fit with other"):
        first_step(fit_steps(samples, path, FitSettings(**options), device="cpu"))


def test_a_saved_state_knows_the_adapters_that_the_fit_started_at(stop, tuned, pairs, options, tmp_path):
    """Without them, the same weights would stand for another base."""
    given = {"pretrained": str(tmp_path / "start.pt")}
    for end in ("", ".adapters"):
        shutil.copy(tuned["checkpoint"] + end, given["pretrained"] + end)
    path = stop(pairs, 1, **given)
    Path(given["pretrained"] + ".adapters").unlink()
    with pytest.raises(EcifError, match="is of a fit with other"):
        fit_model(pairs, path, device="cpu", **(options | given))


@pytest.mark.parametrize("blocked", ["model.pt.resume", "model.pt.resume.tmp"])
def test_a_state_that_cannot_be_saved_is_said(blocked, pairs, options, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "_SAVE_EVERY", 0)
    (tmp_path / blocked).mkdir()
    with pytest.raises(EcifError, match=r"cannot be saved to .*model\.pt\.resume"):
        fit_model(pairs, tmp_path / "model.pt", device="cpu", **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"epochs": 1.5}, r"epochs=1\.5 must be a whole number"),
        ({"batch_size": 1}, "batch_size=1 must be at least 2"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"learning_rate": 0}, "learning_rate=0 must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a positive number"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must be a number from 0 up"),
        ({"scope": "heads+logit_scale"}, r"compute_influence\(fit=True\)"),
        ({"scope": "lora:x"}, "scope='lora:x' is not known"),
        ({"model": "ecif-digit"}, "no model 'ecif-digit'. Did you mean ecif-digits"),
        ({"caption_field": "text"}, "no field 'text'"),
        ({"path": "."}, r"is a folder. Give the path .*model\.pt"),
        ({"path": "taken.pt"}, r"There is a file .*taken\.pt already.*overwrite=True"),
        ({"path": "taken.pt/model.pt"}, r"folder .*taken\.pt cannot be written"),
    ],
)
def test_bad_values_are_refused_before_the_model_is_loaded(given, message, pairs, options, tmp_path, monkeypatch):
    monkeypatch.delattr(api, "load_encoder")
    (tmp_path / "taken.pt").write_bytes(b"precious")
    path = tmp_path / given.get("path", "model.pt")
    settings = {name: value for name, value in given.items() if name != "path"}
    with pytest.raises(EcifError, match=message):
        fit_model(pairs, path, **(options | settings))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("taken.pt", b"precious")]


def test_one_pair_is_too_few(pairs, options, tmp_path):
    with pytest.raises(EcifError, match="at least 2 readable pairs, there are 1"):
        fit_model(pairs[:1], tmp_path / "model.pt", **options)


def test_images_that_cannot_be_read_are_skipped_or_refused_before_training(dataset, stop, options, tmp_path, caplog):
    samples = dataset.match_tags("train").sort_by("id")[:12]
    bad = samples.first()
    broken = tmp_path / "broken.png"  # its header is whole
    broken.write_bytes(Path(bad.filepath).read_bytes()[:200])
    bad.filepath = str(broken)
    bad.save()
    with pytest.raises(EcifError, match=r"broken\.png cannot be read .*skip_failures=True"):
        fit_model(samples, tmp_path / "model.pt", device="cpu", skip_failures=False, **options)
    path = stop(samples, 1, epochs=1)
    result = fit_model(samples, path, device="cpu", **(options | {"epochs": 1}))
    assert list(result["skipped"]) == [bad.id]
    assert (result["pairs"], result["steps"]) == (11, 2)
    assert "Skipped 1 training samples" in caplog.text


@pytest.mark.parametrize(("batch_size", "stage"), [(BATCH, "Fine-tuning"), (PAIRS, "Measuring the loss")])
def test_a_learning_rate_that_is_too_large_is_said_as_soon_as_it_is_seen(batch_size, stage, pairs, options, tmp_path):
    given = options | {"learning_rate": 1e30, "batch_size": batch_size, "epochs": 1}
    seen = []
    with pytest.raises(EcifError, match=r"not finite any more with learning_rate=1e\+30. Use a smaller one"):
        seen.extend(fit_steps(pairs, tmp_path / "model.pt", FitSettings(**given), device="cpu"))
    assert seen[-1].stage == stage
    assert not list(tmp_path.iterdir())


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [fine_tuning._learning_rate(2.0, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert 9 <= rates.index(max(rates)) <= 10
    assert max(rates) == pytest.approx(2, rel=0.03)
    assert rates[50] == pytest.approx(1)
    assert 0 < rates[-1] < 1e-3


def test_weight_decay_shrinks_what_is_trained(pairs, options, tmp_path):
    norms = []
    for decay in (0.0, 50.0):
        path = tmp_path / f"{decay}.pt"
        settings = options | {"scope": "^text_projection$", "weight_decay": decay, "epochs": 1}
        fit_model(pairs, path, device="cpu", **settings)
        norms.append(weights(path)["text_projection"].norm())
    rates = [fine_tuning._learning_rate(3e-3, step, 3) for step in range(3)]
    kept = torch.prod(1 - 50 * torch.tensor(rates))
    assert norms[1] / norms[0] == pytest.approx(kept.item(), rel=0.02)


def test_blocks_of_a_sigmoid_vit_into_a_safetensors_file(pairs, tmp_path):
    (tmp_path / "ecif-test-tuning-vit.json").write_text(json.dumps(VIT))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    start = open_clip.create_model("ecif-test-tuning-vit").eval()
    torch.save(start.state_dict(), tmp_path / "start.pt")
    path = tmp_path / "tuned.safetensors"
    result = fit_model(
        pairs, path, model="ecif-test-tuning-vit", pretrained=str(tmp_path / "start.pt"), scope="blocks:1", device="cpu"
    )
    assert result["loss_after"] < result["loss_before"]
    assert not path.with_name("tuned.safetensors.adapters").exists()
    model = open_clip.create_model("ecif-test-tuning-vit", pretrained=str(path)).eval()
    names = changed(start.state_dict(), model.state_dict())
    assert names
    assert names <= set(result["attributed"])
    assert all(name.split("resblocks.")[1].startswith("1.") for name in result["attributed"])

    encoder = OpenClipEncoder("ecif-test-tuning-vit", str(path), "cpu")
    with torch.no_grad():
        image, text, scale, bias = model(*inputs(encoder, pairs))
        loss = open_clip.loss.SigLipLoss()(image, text, scale, bias).item()
    assert result["loss_after"] == pytest.approx(loss, rel=1e-4)


def test_a_preprocessing_that_a_file_does_not_hold_is_said(pairs, options, tmp_path, monkeypatch, caplog):
    quick = options | {"epochs": 1}
    fit_model(pairs[:4], tmp_path / "plain.pt", device="cpu", **quick)
    assert "force_preprocess_cfg" not in caplog.text
    plain = open_clip.get_model_preprocess_cfg
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda model: plain(model) | {"resize_mode": "squash"})
    fit_model(pairs[:4], tmp_path / "special.pt", device="cpu", **quick)
    assert "special.pt with force_preprocess_cfg={'resize_mode': 'squash'}" in caplog.text


def test_the_command(dataset, made, tmp_path):
    path = tmp_path / "model.pt"
    args = ["fit", dataset.name, path, "--tag", "val", "--model", training.MODEL, "--pretrained", made[1]]
    args += ["--scope", "lora:2", "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--json"]
    ran = CliRunner().invoke(main, [str(arg) for arg in args])
    assert ran.exit_code == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["checkpoint"], result["pairs"], result["steps"]) == (str(path), 24, 6)
    assert path.is_file()
    ran = CliRunner().invoke(main, [str(arg) for arg in args])
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "There is a file" in ran.stderr
    ran = CliRunner().invoke(main, [str(arg) for arg in [*args[:-1], "--overwrite"]])
    assert ran.exit_code == 0, ran.stderr
    assert f"on 24 pairs of {dataset.name!r}, skipped 0." in ran.stdout
