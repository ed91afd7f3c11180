"""Commands that score pairs and act on a model: score, fit, trace, edit."""

from __future__ import annotations

from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, SLICE, job, load_dataset, load_dataset_in_turn, narrow, print_result
from fiftyone_ecif.cli.flags import flags
from fiftyone_ecif.settings.fine_tuning import FitSettings
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings


@click.command()
@click.argument("dataset")
@flags(InfluenceSettings, JobSettings)
@click.option("--tag", "tags", multiple=True, help="Score samples with this tag only.")
@click.option("--view", help="Score this saved view only.")
@click.option("--target-tag", "target_tags", multiple=True, help="Measure influence on samples with this tag.")
@click.option("--target-view", help="Measure influence on this saved view.")
@SLICE
@click.option("--key", default="ecif", show_default=True, help="Names the run and its fields.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be scored.")
@AS_JSON
def score(
    dataset: str,
    tags: tuple[str, ...],
    view: str | None,
    target_tags: tuple[str, ...],
    target_view: str | None,
    slice: str | None,
    key: str,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compute the influence of every pair of DATASET on validation pairs.

    Example: fiftyone-ecif score my-pairs --tag train --target-tag val --model ViT-B-32 --pretrained laion2b_s34b_b79k

    Several processes share the work: torchrun --nproc-per-node 4 -m fiftyone_ecif score ...
    """
    if not (target_tags or target_view):
        raise click.UsageError("Say what to measure influence on: --target-tag or --target-view")
    with job(shared=True):
        from fiftyone_ecif.distributed import join

        processes = join()
        found = load_dataset_in_turn(dataset, processes)
        from fiftyone_ecif.api.influence import compute_influence  # brings FiftyOne

        results = compute_influence(
            narrow(found, tags, view, slice),
            target=narrow(found, target_tags, target_view, slice),
            brain_key=key,
            skip_failures=not strict,
            progress=None if processes.first else False,
            **options,
        )
        result = {
            "dataset": dataset,
            "key": key,
            "scored": len(results.ids),
            "skipped": results.skipped,
            "diagnostics": results.diagnostics,
        }
        processes.wait()  # FiftyOne's database can go when the process that started it ends
    if processes.first:
        print_result(
            result,
            as_json,
            lambda r: f"Scored {r['scored']} pairs of {dataset!r}, skipped {len(r['skipped'])}. Field: {key}_influence",
        )


@click.command()
@click.argument("dataset")
@click.argument("path")
@flags(FitSettings)
@click.option("--tag", "tags", multiple=True, help="Train on samples with this tag only.")
@click.option("--view", help="Train on this saved view only.")
@SLICE
@click.option("--device", help="cpu or cuda.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be trained on.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint.")
@AS_JSON
def fit(
    dataset: str,
    path: str,
    tags: tuple[str, ...],
    view: str | None,
    slice: str | None,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune a pretrained model on the pairs of DATASET and write the checkpoint PATH.

    A fit that was stopped goes on where it was when the same command is run again.

    Example: fiftyone-ecif fit my-pairs tuned.pt --tag train --model ViT-B-32 --pretrained laion2b_s34b_b79k
    """
    with job():
        from fiftyone_ecif.api.fine_tuning import fit_model

        samples = narrow(load_dataset(dataset), tags, view, slice)
        result = fit_model(samples, path, skip_failures=not strict, **options)
    print_result(
        result,
        as_json,
        lambda r: (
            f"Trained {r['parameters']} parameters on {r['pairs']} pairs of {dataset!r}, skipped {len(r['skipped'])}. "
            f"Mean pair loss {r['loss_before']:.3f} before, {r['loss_after']:.3f} after. Checkpoint: {r['checkpoint']}"
        ),
    )


@click.command()
@click.argument("dataset")
@click.option("--key", default="ecif", show_default=True, help="The run.")
@click.option("--count", default=10, show_default=True, help="Training pairs of each kind to print for each mistake.")
@click.option("--exact", is_flag=True, help="Solve for each mistake with the model instead of reading gradients.")
@click.option("--device", help="cpu or cuda, with --exact.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def trace(dataset: str, key: str, as_json: bool, **options: Any) -> None:
    """Find the training pairs of DATASET behind each mistake on a run's validation pairs.

    Example: fiftyone-ecif trace my-pairs --count 5
    """
    with job():
        from fiftyone_ecif.api.tracing import trace as find
        from fiftyone_ecif.runs.manage import load_run

        found = load_dataset(dataset)
        results = load_run(found, key)
        traces = find(results, **options)
        texts = _captions(results, traces)
        result = [
            {
                **one._asdict(),
                "culprits": [culprit._asdict() for culprit in one.culprits],
                "helpers": [helper._asdict() for helper in one.helpers],
                "neighbours": [neighbour._asdict() for neighbour in one.neighbours],
                "retrieved": [retrieved._asdict() for retrieved in one.retrieved],
            }
            for one in traces
        ]
    print_result(result, as_json, lambda r: _trace_report(r, texts))


def _captions(results: Any, traces: Any) -> dict[str, str]:
    """Captions of the pairs that traces name, or what became of them."""
    from fiftyone_ecif.samples.pairs import pairs_now

    pairs = [pair.id for one in traces for pair in (*one.culprits, *one.helpers, *one.neighbours)]
    target = [match.found for one in traces for match in one.retrieved if match.kind != "class"]
    texts: dict[str, str] = {}
    for dataset, named in ((results.samples._dataset, pairs), (results.target_dataset(), target)):
        there = pairs_now(dataset, results.config.caption_field, named) if dataset is not None else {}
        texts |= {sample: there[sample][1] or "(no caption)" if sample in there else "(deleted)" for sample in named}
    return texts


def _trace_report(traces: list[dict[str, Any]], captions: dict[str, str]) -> str:
    if not traces:
        return "No mistakes."
    lines = []
    for one in traces:
        lines += ["", f"{one['id']}, loss {one['loss']:.3f}"]
        if one["retrieved"]:
            lines.append("          Similarity  Right one  Retrieved instead")
        for r in one["retrieved"]:
            what = (
                f"{r['found']}, not {r['right']}" if r["kind"] == "class" else f"{r['found']}  {captions[r['found']]}"
            )
            lines.append(f"  {r['similarity']:18.3f}  {r['right_similarity']:9.3f}  {r['kind']} {what}")
        lines.append("  Relative influence  Culprit                   Caption")
        lines += [f"  {c['relative_influence']:18.2e}  {c['id']}  {captions[c['id']]}" for c in one["culprits"]]
        lines += ["  Relative influence  Helper                    Caption"]
        lines += [f"  {h['relative_influence']:18.2e}  {h['id']}  {captions[h['id']]}" for h in one["helpers"]]
        lines += ["          Similarity  Neighbour                 Caption"]
        lines += [f"  {n['similarity']:18.3f}  {n['id']}  {captions[n['id']]}" for n in one["neighbours"]]
    return "\n".join(lines[1:])


@click.command()
@click.argument("dataset")
@click.argument("path")
@click.option("--key", default="ecif", show_default=True, help="The run.")
@click.option("--tag", "tags", multiple=True, help="Take out samples with this tag.")
@click.option("--view", help="Take out this saved view.")
@click.option("--device", help="cpu or cuda.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint.")
@AS_JSON
def edit(
    dataset: str, path: str, key: str, tags: tuple[str, ...], view: str | None, as_json: bool, **options: Any
) -> None:
    """Write the model of a run on DATASET to PATH as if some pairs had never been trained on.

    Example: fiftyone-ecif edit my-pairs edited.pt --tag harmful
    """
    with job():
        from fiftyone_ecif.api.editing import Edit, edit_model
        from fiftyone_ecif.runs.manage import load_run

        if not (tags or view):
            raise click.UsageError("Say what to take out: --tag or --view")
        found = load_dataset(dataset)
        result = edit_model(load_run(found, key), narrow(found, tags, view), path, **options)._asdict()
    print_result(result, as_json, lambda r: str(Edit(**r)))
