"""Commands that act on samples by their scores: tag, export."""

from __future__ import annotations

from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, SLICE, job, load_dataset, narrow, print_result


@click.command()
@click.argument("dataset")
@click.option("--field", default="ecif_influence", show_default=True, help="The score.")
@click.option(
    "--direction", type=click.Choice(["harmful", "valuable", "suspicious"]), default="harmful", show_default=True
)
@click.option("--count", type=int, help="How many pairs.")
@click.option("--share", type=float, help="Which share of the scored pairs.")
@click.option("--threshold", type=float, help="All pairs beyond this score.")
@click.option("--tag", help="The tag; by default the direction.")
@SLICE
@AS_JSON
def tag(
    dataset: str, field: str, direction: str, tag: str | None, slice: str | None, as_json: bool, **limit: Any
) -> None:
    """Tag the most harmful or the most valuable pairs of DATASET.

    Example: fiftyone-ecif tag my-pairs --count 100
    """
    with job():
        from fiftyone_ecif.samples.selection import tag_by_influence

        view = tag_by_influence(narrow(load_dataset(dataset), (), None, slice), field, tag, direction, **limit)
        result = {"dataset": dataset, "tag": tag or direction, "tagged": len(view)}
    print_result(result, as_json, lambda r: f"Tagged {r['tagged']} pairs of {dataset!r} as {r['tag']!r}")


@click.command()
@click.argument("dataset")
@click.argument("path")
@click.option("--tag", "tags", multiple=True, help="Export samples with this tag only.")
@click.option("--view", help="Export this saved view only.")
@SLICE
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@AS_JSON
def export(
    dataset: str,
    path: str,
    tags: tuple[str, ...],
    view: str | None,
    slice: str | None,
    caption_field: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write ids, paths, captions, tags and scores of DATASET to PATH (.csv or .json).

    Example: fiftyone-ecif export my-pairs harmful.csv --tag harmful
    """
    with job():
        from fiftyone_ecif.samples.export import export_pairs

        samples = narrow(load_dataset(dataset), tags, view, slice)
        count = export_pairs(samples, path, caption_field, overwrite=overwrite)
    print_result(
        {"dataset": dataset, "path": path, "exported": count}, as_json, lambda r: f"Exported {count} pairs to {path}"
    )
