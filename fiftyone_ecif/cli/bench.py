"""The commands of ``fiftyone-ecif bench``."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, job, print_result
from fiftyone_ecif.errors import EcifError


@click.group()
def bench() -> None:
    """Measure this software against retraining and against other methods."""


@bench.command()
@click.option("--quick", is_flag=True, help="One seed and smaller parts: minutes instead of a quarter of an hour.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md, result.json and plots.")
@AS_JSON
def fidelity(quick: bool, out: Path | None, as_json: bool) -> None:
    """Hold predicted effects of removing pairs against real retraining, beside other attribution methods.

    Example: fiftyone-ecif bench fidelity --quick --out fidelity
    """
    with job():
        from fiftyone_ecif.bench.fidelity.experiments import run
        from fiftyone_ecif.bench.fidelity.report import markdown, plot
        from fiftyone_ecif.bench.fidelity.sizes import QUICK, Sizes

        result = run(QUICK if quick else Sizes(), lambda name: click.echo(name, err=True), partial(_keep, out))
        if out:
            plot(result, out)
            (out / "report.md").write_text(markdown(result))
    print_result(result, as_json, markdown)


@bench.command()
@click.option("--rounds", type=click.IntRange(min=4), default=200, show_default=True, help="How often to do it.")
@click.option("--pairs", default=200, show_default=True, help="Pairs of the demo set that it is done on.")
@AS_JSON
def soak(rounds: int, pairs: int, as_json: bool) -> None:
    """Score, trace and delete on one dataset, over and over, and see whether memory and disk stay flat.

    Example: fiftyone-ecif bench soak --rounds 200
    """
    with job():
        from fiftyone_ecif.bench import soak as work
        from fiftyone_ecif.demo.demo import demo_model, load_demo

        dataset = load_demo(pairs, name="ecif-soak")
        result = work.soak(
            dataset, demo_model(dataset), rounds, lambda done, total: click.echo(f"{done} of {total}", err=True)
        )
        dataset.delete()
    print_result(result, as_json, work.markdown)


@bench.command("misalignment")
@click.option("--data", required=True, help="digits, shapes, emoji, emoji-twitter, or a folder with pairs.csv.")
@click.option("--frozen", is_flag=True, help="Train heads on frozen pretrained towers instead of a small model.")
@click.option("--pretrained", is_flag=True, help="Audit a stand-in for a pretrained model that never saw the pairs.")
@click.option("--noise", "noises", multiple=True, help="Kind of noise, repeatable. Default: all that the pairs allow.")
@click.option(
    "--ratio", "ratios", type=click.FloatRange(0.01, 0.9), multiple=True, help="Share of wrong captions, repeatable."
)
@click.option("--quick", is_flag=True, help="One seed and one ratio on at most 600 pairs.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md, result.json and plots.")
@AS_JSON
def bench_misalignment(
    data: str,
    frozen: bool,
    pretrained: bool,
    noises: tuple[str, ...],
    ratios: tuple[float, ...],
    quick: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Hold detectors of misaligned pairs against each other on clean pairs whose captions are permuted.

    Example: fiftyone-ecif bench misalignment --data digits --quick --out misalignment
    """
    with job():
        from fiftyone_ecif.bench.misalignment.experiments import FROZEN, PRETRAINED, QUICK, SCRATCH, Sizes, run
        from fiftyone_ecif.bench.misalignment.pairs import load_pairs
        from fiftyone_ecif.bench.misalignment.report import markdown, plot

        if frozen and pretrained:
            raise EcifError("--frozen and --pretrained are two ways to get a model: give one of them")
        regime = FROZEN if frozen else PRETRAINED if pretrained else SCRATCH
        sizes = QUICK if quick else Sizes()
        sizes = replace(sizes, ratios=ratios or sizes.ratios)
        result = run(
            load_pairs(data), sizes, regime, noises, lambda text: click.echo(text, err=True), partial(_keep, out)
        )
        if out:
            plot(result, out)
            (out / "report.md").write_text(markdown(result))
    print_result(result, as_json, markdown)


@bench.command("speed")
@click.option("--quick", is_flag=True, help="Fewer pairs and smaller models: minutes instead of an hour.")
@click.option("--peers", is_flag=True, help="Install other libraries, apart from this software, and run them too.")
@click.option("--device", help="Measure the stages of a job on this device only, cuda or cpu, and no other software.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md and result.json.")
@AS_JSON
def bench_speed(quick: bool, peers: bool, device: str | None, out: Path | None, as_json: bool) -> None:
    """Hold seconds and memory of scoring against embeddings, forward passes, hooks and the disk.

    Example: fiftyone-ecif bench speed --quick --out speed
    """
    if device:
        _bench_device(quick, device, out, as_json)
        return
    with job():
        from fiftyone_ecif.bench.speed.experiments import QUICK, Sizes, markdown, run

        result = run(QUICK if quick else Sizes(), peers, lambda text: click.echo(text, err=True), partial(_keep, out))
        if out:
            (out / "report.md").write_text(markdown(result))
    print_result(result, as_json, markdown)


def _bench_device(quick: bool, device: str, out: Path | None, as_json: bool) -> None:
    """Measures the stages of a job on one device."""
    with job():
        from fiftyone_ecif.bench.speed import stages
        from fiftyone_ecif.devices import choose_device

        pairs = [10_000] if quick else [10_000, 100_000, 1_000_000]
        models = ["ViT-B-32"] if quick else ["ViT-B-32", "ViT-L-14"]
        photographs = 512 if quick else 12_288
        result = stages.run(choose_device(device), pairs, models, photographs, partial(_keep, out))
        if out:
            (out / "report.md").write_text(stages.markdown(result))
    print_result(result, as_json, stages.markdown)


@bench.command("models")
@click.option("--model", "names", multiple=True, help="Only this model of open_clip, repeatable. Default: all.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write report.md and result.json.")
@AS_JSON
def bench_models(names: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Do everything with each of open_clip's models, shrunken, and hold it against open_clip's own code.

    Example: fiftyone-ecif bench models --out models
    """
    with job():
        from fiftyone_ecif.bench.models.report import markdown, run

        result = run(names, lambda text: click.echo(text, err=True), partial(_keep, out))
        if out:
            (out / "report.md").write_text(markdown(result))
    print_result(result, as_json, markdown)


def _keep(out: Path | None, found: dict[str, Any]) -> None:
    """Writes what is measured so far, so that a run that is stopped leaves it."""
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(found))
