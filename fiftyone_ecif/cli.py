"""The command line: the plugin's jobs from a shell.

Results go to stdout, progress and messages to stderr. Exit code 1: the job
failed; 2: the command was misused.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click

from . import __version__
from .errors import EcifError

_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@functools.cache
def _messages() -> TextIO:
    """A second stream to stderr, for what FiftyOne prints.

    Not stderr itself: FiftyOne's progress bars take over every log handler of
    the stream that they draw on. Never closed: FiftyOne's log keeps it.
    """
    return open(os.dup(2), "w", buffering=1)


@contextlib.contextmanager
def _job() -> Iterator[None]:
    """Keeps stdout for results and turns the library's errors into one line and exit code 1."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("fiftyone_ecif").setLevel(logging.INFO)
    with contextlib.redirect_stdout(_messages()):
        try:
            yield
        except EcifError as error:
            raise click.ClickException(str(error)) from error


def _print(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    click.echo(json.dumps(result) if as_json else text(result))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Which image-caption pairs help a CLIP-style model, which hurt it, and why."""


@main.command()
@click.option("--pairs", default=2000, show_default=True, help="Training pairs to make.")
@click.option("--noise", default=0.2, show_default=True, help="Share of the captions to spoil.")
@click.option("--seed", default=0, show_default=True, help="Fixes everything.")
@click.option("--no-app", is_flag=True, help="Do not open the App.")
@click.option("--port", type=int, help="The App's port; FiftyOne's default otherwise.")
@_AS_JSON
def demo(pairs: int, noise: float, seed: int, no_app: bool, port: int | None, as_json: bool) -> None:
    """Make captioned scenes of handwritten digits, train a small CLIP on them, score them, open the App.

    Example: fiftyone-ecif demo --pairs 1000 --noise 0.3
    """
    with _job():
        from .demo import open_demo, run_demo

        result = run_demo(pairs, noise, seed)
    _print(result, as_json, _demo_report)
    if not no_app:
        with _job():
            open_demo(result["dataset"], port)


def _demo_report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['pairs']} pairs, {result['spoiled']} of them with a spoiled caption.",
        f"Of the 10 most harmful pairs, {result['precision_at_10']:.0%} are spoiled.",
        "",
        "Detector           AUROC for spoiled captions",
    ]
    lines += [f"{name:<18} {'-' if value is None else format(value, '.3f')}" for name, value in result["auroc"].items()]
    lines += ["", "Seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in result["seconds"].items())]
    lines += [f"Dataset {result['dataset']!r}, fields {', '.join(result['fields'])}."]
    return "\n".join(lines)


@main.command()
@click.argument("dataset")
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--model", default="ViT-B-32", show_default=True, help="An open_clip model.")
@click.option("--pretrained", help="A pretrained tag of the model, or the path of a checkpoint.")
@click.option("--tag", "tags", multiple=True, help="Score samples with this tag only.")
@click.option("--view", help="Score this saved view only.")
@click.option("--target-tag", "target_tags", multiple=True, help="Measure influence on samples with this tag.")
@click.option("--target-view", help="Measure influence on this saved view.")
@click.option("--key", default="ecif", show_default=True, help="Names the run and its fields.")
@click.option("--fit", is_flag=True, help="Bring the heads to a stationary point first.")
@click.option("--proximal", default=0.1, show_default=True, help="Pull to the loaded weights.")
@click.option("--batch-size", type=int, help="Pairs that compete in one softmax.")
@click.option("--seed", default=0, show_default=True, help="Which pairs share a batch.")
@click.option("--device", help="cpu or cuda.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be scored.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same key.")
@_AS_JSON
def score(
    dataset: str,
    tags: tuple[str, ...],
    view: str | None,
    target_tags: tuple[str, ...],
    target_view: str | None,
    key: str,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compute the influence of every pair of DATASET on validation pairs.

    Example: fiftyone-ecif score my-pairs --tag train --target-tag val --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """
    with _job():
        from .api import compute_influence

        if not (target_tags or target_view):
            raise click.UsageError("Say what to measure influence on: --target-tag or --target-view")
        found = _load(dataset)
        results = compute_influence(
            _narrow(found, tags, view),
            target=_narrow(found, target_tags, target_view),
            brain_key=key,
            skip_failures=not strict,
            **options,
        )
        result = {
            "dataset": dataset,
            "key": key,
            "scored": len(results.ids),
            "skipped": results.skipped,
            "diagnostics": results.diagnostics,
        }
    _print(
        result,
        as_json,
        lambda r: f"Scored {r['scored']} pairs of {dataset!r}, skipped {len(r['skipped'])}. Field: {key}_influence",
    )


@main.command()
@click.argument("dataset")
@click.argument("path")
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--tag", "tags", multiple=True, help="Train on samples with this tag only.")
@click.option("--view", help="Train on this saved view only.")
@click.option("--model", default="ViT-B-32", show_default=True, help="An open_clip model.")
@click.option("--pretrained", help="A pretrained tag of the model, or the path of a checkpoint.")
@click.option("--scope", default="lora", show_default=True, help="What to train: lora:RANK, blocks:K or a pattern.")
@click.option("--epochs", default=5, show_default=True, help="How often each pair is seen.")
@click.option("--batch-size", default=64, show_default=True, help="Pairs that compete in one softmax.")
@click.option("--learning-rate", default=1e-3, show_default=True, help="The highest, after the warm-up.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Of what is trained to zero.")
@click.option("--seed", default=0, show_default=True, help="Fixes new adapters and all batches.")
@click.option("--device", help="cpu or cuda.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be trained on.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint.")
@_AS_JSON
def fit(
    dataset: str,
    path: str,
    tags: tuple[str, ...],
    view: str | None,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune a pretrained model on the pairs of DATASET and write the checkpoint PATH.

    A fit that was stopped goes on where it was when the same command is run again.

    Example: fiftyone-ecif fit my-pairs tuned.pt --tag train --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """
    with _job():
        from .tuning import fit_model

        result = fit_model(_narrow(_load(dataset), tags, view), path, skip_failures=not strict, **options)
    _print(
        result,
        as_json,
        lambda r: (
            f"Trained {r['parameters']} parameters on {r['pairs']} pairs of {dataset!r}, skipped {len(r['skipped'])}. "
            f"Mean pair loss {r['loss_before']:.3f} before, {r['loss_after']:.3f} after. Checkpoint: {r['checkpoint']}"
        ),
    )


@main.command()
@click.argument("dataset")
@click.option("--field", default="ecif_influence", show_default=True, help="The score.")
@click.option("--direction", type=click.Choice(["harmful", "valuable"]), default="harmful", show_default=True)
@click.option("--count", type=int, help="How many pairs.")
@click.option("--share", type=float, help="Which share of the scored pairs.")
@click.option("--threshold", type=float, help="All pairs beyond this score.")
@click.option("--tag", help="The tag; by default the direction.")
@_AS_JSON
def tag(dataset: str, field: str, direction: str, tag: str | None, as_json: bool, **limit: Any) -> None:
    """Tag the most harmful or the most valuable pairs of DATASET.

    Example: fiftyone-ecif tag my-pairs --count 100
    """
    with _job():
        from .curation import tag_by_influence

        view = tag_by_influence(_load(dataset), field, tag, direction, **limit)
        result = {"dataset": dataset, "tag": tag or direction, "tagged": len(view)}
    _print(result, as_json, lambda r: f"Tagged {r['tagged']} pairs of {dataset!r} as {r['tag']!r}")


@main.command()
@click.argument("dataset")
@click.argument("path")
@click.option("--tag", "tags", multiple=True, help="Export samples with this tag only.")
@click.option("--view", help="Export this saved view only.")
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@_AS_JSON
def export(
    dataset: str,
    path: str,
    tags: tuple[str, ...],
    view: str | None,
    caption_field: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ids, paths, captions, tags and scores of DATASET to PATH (.csv or .json).

    Example: fiftyone-ecif export my-pairs harmful.csv --tag harmful
    """
    with _job():
        from .curation import export_pairs

        count = export_pairs(_narrow(_load(dataset), tags, view), path, caption_field, overwrite=overwrite)
    _print(
        {"dataset": dataset, "path": path, "exported": count}, as_json, lambda r: f"Exported {count} pairs to {path}"
    )


@main.group()
def plugin() -> None:
    """The FiftyOne plugin."""


@plugin.command()
@_AS_JSON
def install(as_json: bool) -> None:
    """Make FiftyOne find the plugin, from a pip install or a clone."""
    with _job():
        from .install import install_plugin

        place = str(install_plugin())
    _print({"plugin": place}, as_json, lambda r: f"FiftyOne finds the plugin at {place}. Restart the App if it runs")


@main.command()
@_AS_JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has, what it lacks and how to get it."""
    with _job():
        from .health import examine

        checks = examine()
        usable = all(check.ok for check in checks if check.required)
    _print(
        {"checks": [check._asdict() for check in checks], "ok": usable},
        as_json,
        lambda _: "\n".join(f"{'ok     ' if c.ok else 'missing'}  {c.name}: {c.found}" for c in checks),
    )
    if not usable:
        sys.exit(1)


def _load(name: str) -> Any:
    import fiftyone as fo

    if not fo.dataset_exists(name):
        known = ", ".join(fo.list_datasets()) or "none"
        raise EcifError(f"There is no dataset {name!r}. Datasets here: {known}")
    return fo.load_dataset(name)


def _narrow(dataset: Any, tags: tuple[str, ...], view: str | None) -> Any:
    if view is not None and not dataset.has_saved_view(view):
        known = ", ".join(dataset.list_saved_views()) or "none"
        raise EcifError(f"{dataset.name!r} has no saved view {view!r}. Saved views: {known}")
    samples = dataset.load_saved_view(view) if view else dataset.view()
    return samples.match_tags(list(tags)) if tags else samples
