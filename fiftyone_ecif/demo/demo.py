"""The demo: a captioned dataset with known mistakes, a model trained on it, its influence scores."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiftyone as fo
import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from fiftyone_ecif.api.influence import compute_influence
from fiftyone_ecif.api.progress_bar import follow
from fiftyone_ecif.demo import scenes, training
from fiftyone_ecif.demo.training import MODEL, train
from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.install.plugin import install_plugin
from fiftyone_ecif.store.files import atomic_path, cache_folder
from fiftyone_ecif.store.keys import digest
from fiftyone_ecif.store.tables import Store

logger = logging.getLogger(__name__)

DATASET = "ecif-demo"
KEY = "ecif"
DEFAULT_PAIRS = 2000


def training_steps(pairs: int) -> int:
    """How long the demo's model is trained: 500 batches for the default set, fewer for a smaller one."""
    return min(max(pairs // 4, 150), 500)


def load_demo(pairs: int = DEFAULT_PAIRS, noise: float = 0.2, seed: int = 0, name: str = DATASET) -> fo.Dataset:
    """The demo set as a FiftyOne dataset; made on the first call, then kept. No file of it is ever written again.

    Each sample has a ``caption``, the ``true_caption``, how it was ``spoiled``
    (``"swapped"``, ``"attribute"``, ``"relation"``, or nothing) and the tag
    ``train`` or ``val``. See :mod:`fiftyone_ecif.demo.scenes`.

    Args:
        pairs (2000): training pairs; a quarter as many are added for validation.
        noise (0.2): share of the training captions to spoil.
        seed (0): fixes everything.
        name ("ecif-demo"): of the dataset; one of that name that was made by
            this function with other arguments is replaced.

    Returns:
        the dataset, persistent
    """
    made_of = {"pairs": pairs, "noise": noise, "seed": seed}
    folder = demo_folder(pairs, noise, seed) / "images"
    there = fo.load_dataset(name) if fo.dataset_exists(name) else None
    if there is not None and "ecif_demo" not in there.info:
        raise EcifError(f"There is a dataset {name!r} that is not the demo's. Rename it, or choose another name")
    known = [] if there is None or there.info["ecif_demo"] != made_of else there.values("filepath")
    if known and all(Path(path).is_file() for path in known):
        return there

    samples = []
    for number, pair in enumerate(scenes.make_pairs(pairs, noise, seed)):
        path = folder / f"{number:05d}.png"
        if not path.is_file():  # another dataset may use it, and would take one that is written again for changed
            with atomic_path(path, shared=True) as temporary:
                Image.fromarray(pair.image).save(temporary, "PNG")
        samples.append(
            fo.Sample(
                filepath=str(path),
                tags=[pair.split],
                caption=pair.caption,
                true_caption=pair.true_caption,
                spoiled=pair.spoiled,
            )
        )
    if known and {sample.filepath for sample in samples}.issuperset(known):
        return there  # with its runs: what was missing is there again
    if there is not None:
        Store(str(there._doc.id)).delete()
    dataset = fo.Dataset(name, persistent=True, overwrite=True)
    for field in ("caption", "true_caption", "spoiled"):
        dataset.add_sample_field(field, fo.StringField)
    dataset.add_samples(samples, progress=False)
    dataset.info = {"ecif_demo": made_of}
    dataset.app_config.active_fields = fo.core.odm.ActiveFields(paths=["caption", f"{KEY}_rank", "spoiled"])
    dataset.save()
    return dataset


def demo_folder(pairs: int, noise: float, seed: int) -> Path:
    """Where the images and the model of a demo set lie, one folder for each way to make it."""
    recipe = [pairs, noise, seed, inspect.getsource(scenes), inspect.getsource(training)]
    return cache_folder() / "demo" / digest(repr(recipe), size=8)


def demo_model(dataset: fo.Dataset, progress: bool | Callable[..., None] | None = None) -> str:
    """Checkpoint of a model trained on the training pairs of the demo set; trained on the first call.

    Args:
        dataset: from :func:`load_demo`.
        progress (None): whether to show a progress bar.

    Returns:
        the path, for ``pretrained=`` with ``model="ecif-digits"``
    """
    recipe = dataset.info["ecif_demo"]
    checkpoint = demo_folder(**recipe) / "model.pt"
    if not checkpoint.is_file():
        paths, captions = dataset.match_tags("train").sort_by("filepath").values(["filepath", "caption"])
        steps = training_steps(recipe["pairs"])
        follow(train([Path(path) for path in paths], captions, checkpoint, steps, recipe["seed"]), progress)
    return str(checkpoint)


def run_demo(
    pairs: int = DEFAULT_PAIRS,
    noise: float = 0.2,
    seed: int = 0,
    progress: bool | Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Makes the demo set, trains its model, scores its pairs and measures what was found.

    Returns:
        ``dataset`` (its name), ``model`` and ``checkpoint``, ``pairs``, ``validation_pairs``, ``spoiled``
        (counts), ``precision_at_10`` (share of spoiled captions among the ten
        most harmful pairs), ``auroc`` (detector -> area under the ROC curve for
        spoiled captions), ``seconds`` (stage -> time), ``fields`` (those
        written) and ``diagnostics`` of the run
    """
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - start - sum(seconds.values()), 2)

    dataset = load_demo(pairs, noise, seed)
    lap("dataset")
    checkpoint = demo_model(dataset, progress)
    lap("training")
    scored = dataset.match_tags("train")
    results = compute_influence(
        scored,
        caption_field="caption",
        model=MODEL,
        pretrained=checkpoint,
        target=dataset.match_tags("val"),
        brain_key=KEY,
        fit=True,
        overwrite=True,
        num_workers=0,
        progress=progress,
    )
    lap("influence")

    influence, spoiled = dataset.select(results.ids, ordered=True).values([f"{KEY}_influence", "spoiled"])
    detectors = {  # higher = more suspicious
        "influence": -np.array(influence),
        "clip_score": -results.clip_score(),
        "self_influence": results.self_influence(),
    }
    wrong = np.array([kind is not None for kind in spoiled])
    most_harmful = np.argsort(detectors["influence"])[::-1][:10]
    return {
        "dataset": dataset.name,
        "model": MODEL,
        "checkpoint": checkpoint,
        "pairs": len(scored),
        "validation_pairs": results.diagnostics["target_pairs"],
        "spoiled": int(wrong.sum()),
        "precision_at_10": float(wrong[most_harmful].mean()),
        "auroc": {
            name: round(float(roc_auc_score(wrong, score)), 4) if 0 < wrong.sum() < len(wrong) else None
            for name, score in detectors.items()
        },
        "seconds": seconds,
        "fields": sorted(field for field in dataset.get_field_schema() if field.startswith(f"{KEY}_")),
        "diagnostics": results.diagnostics,
    }


def open_demo(name: str, port: int | None = None) -> None:
    """Opens the App on the demo's pairs, the most harmful first, and waits until it is closed.

    Args:
        name: of the dataset.
        port (None): of the App.
    """
    install_plugin()
    dataset = fo.load_dataset(name)
    field = f"{KEY}_influence"
    session = fo.launch_app(view=dataset.exists(field).sort_by(field), port=port)
    logger.info("The App is at %s. Press Ctrl-C here to end it", session.url)
    session.wait(-1)
