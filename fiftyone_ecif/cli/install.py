"""Commands for the first minutes: demo, plugin install, doctor."""

from __future__ import annotations

import sys
from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, job, print_result


@click.command()
@click.option("--pairs", default=2000, show_default=True, help="Training pairs to make.")
@click.option("--noise", default=0.2, show_default=True, help="Share of the captions to spoil.")
@click.option("--seed", default=0, show_default=True, help="Fixes everything.")
@click.option("--no-app", is_flag=True, help="Do not open the App.")
@click.option("--port", type=int, help="The App's port; FiftyOne's default otherwise.")
@AS_JSON
def demo(pairs: int, noise: float, seed: int, no_app: bool, port: int | None, as_json: bool) -> None:
    """Make captioned scenes of handwritten digits, train a small CLIP on them, score them, open the App.

    Example: fiftyone-ecif demo --pairs 1000 --noise 0.3
    """
    with job():
        from fiftyone_ecif.demo.demo import open_demo, run_demo

        result = run_demo(pairs, noise, seed)
    print_result(result, as_json, _demo_report)
    if not no_app:
        with job():
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


@click.group()
def plugin() -> None:
    """The FiftyOne plugin."""


@plugin.command()
@AS_JSON
def install(as_json: bool) -> None:
    """Make FiftyOne find the plugin, from a pip install or a clone."""
    with job():
        from fiftyone_ecif.install.plugin import install_plugin

        place = str(install_plugin())
    print_result(
        {"plugin": place}, as_json, lambda r: f"FiftyOne finds the plugin at {place}. Restart the App if it runs"
    )


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has, what it lacks and how to get it."""
    with job():
        from fiftyone_ecif.install.doctor import examine

        checks = examine()
        usable = all(check.ok for check in checks if check.required)
    print_result(
        {"checks": [check._asdict() for check in checks], "ok": usable},
        as_json,
        lambda _: "\n".join(f"{'ok     ' if c.ok else 'missing'}  {c.name}: {c.found}" for c in checks),
    )
    if not usable:
        sys.exit(1)
