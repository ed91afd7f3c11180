"""Commands that look for misaligned pairs: misalignment, review."""

from __future__ import annotations

from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, SLICE, job, load_dataset, load_dataset_in_turn, narrow, print_result
from fiftyone_ecif.cli.flags import flags
from fiftyone_ecif.misalignment.judgement import TRUSTED
from fiftyone_ecif.misalignment.noise_rate import NoiseRate
from fiftyone_ecif.samples.review_tags import ALIGNED, LEAST, MISALIGNED
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.misalignment import MisalignmentSettings


@click.command()
@click.argument("dataset")
@flags(MisalignmentSettings, JobSettings)
@click.option("--tag", "tags", multiple=True, help="Look at samples with this tag only.")
@click.option("--view", help="Look at this saved view only.")
@SLICE
@click.option("--key", default="audit", show_default=True, help="Names the run and its fields.")
@click.option(
    "--target-tag", "target_tags", multiple=True, help="Validation pairs with this tag, for global_influence."
)
@click.option("--target-view", help="Validation pairs of this saved view, for global_influence.")
@click.option("--mark", metavar="TAG", help="Give the most suspicious pairs this tag, such as suspect.")
@click.option(
    "--share",
    type=float,
    help="Which share of the pairs to mark; by default the estimated rate.",
)
@click.option("--threshold", type=float, help="Mark all pairs above this score instead.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be scored.")
@AS_JSON
def misalignment(
    dataset: str,
    tags: tuple[str, ...],
    view: str | None,
    slice: str | None,
    key: str,
    target_tags: tuple[str, ...],
    target_view: str | None,
    mark: str | None,
    strict: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Find pairs of DATASET whose caption does not belong to the image, without labels.

    Example: fiftyone-ecif misalignment my-pairs --model ViT-B-32 --pretrained laion2b_s34b_b79k --mark suspect

    Several processes share the work: torchrun --nproc-per-node 4 -m fiftyone_ecif misalignment ...
    """
    with job(shared=True):
        from fiftyone_ecif.distributed import join

        processes = join()
        found = load_dataset_in_turn(dataset, processes)
        from fiftyone_ecif.api.misalignment import compute_misalignment  # brings FiftyOne

        results = compute_misalignment(
            narrow(found, tags, view, slice),
            target=narrow(found, target_tags, target_view, slice) if target_tags or target_view else None,
            brain_key=key,
            tag=mark,
            skip_failures=not strict,
            progress=None if processes.first else False,
            **options,
        )
        result = {
            "dataset": dataset,
            "key": key,
            "scored": len(results.ids),
            "skipped": results.skipped,
            "noise_rate": results.noise_rate._asdict(),
            "tagged": results.diagnostics.get("tagged"),
            "diagnostics": results.diagnostics,
        }
        processes.wait()  # FiftyOne's database can go when the process that started it ends
    if processes.first:
        print_result(result, as_json, lambda r: _misalignment_report(r, mark))


def _misalignment_report(result: dict[str, Any], mark: str | None) -> str:
    power = result["diagnostics"]["power"]
    lines = [
        f"Scored {result['scored']} pairs of {result['dataset']!r}, skipped {len(result['skipped'])}. "
        f"Field: {result['key']}_misalignment",
        f"{NoiseRate(**result['noise_rate'])}.",
        f"Known wrong captions are found at AUROC {power['random']:.2f} where captions were swapped at random, "
        f"{power['subtle']:.2f} where for a similar one.",
    ]
    if power["random"] < TRUSTED:
        lines.append("Warning: that is too little to rely on the score. Use a stronger model.")
    if mark:
        lines.append(f"Tagged {result['tagged']} pairs as {mark!r}.")
    return "\n".join(lines)


@click.command()
@click.argument("dataset")
@click.option("--key", default="audit", show_default=True, help="The run of misalignment.")
@click.option("--count", default=20, show_default=True, help="Pairs to propose.")
@AS_JSON
def review(dataset: str, key: str, count: int, as_json: bool) -> None:
    """Refit a run on DATASET to the pairs tagged aligned or misaligned, and propose pairs to look at next.

    Example: fiftyone-ecif review my-pairs --count 20
    """
    with job():
        from fiftyone_ecif.api.review import review_or_propose
        from fiftyone_ecif.runs.manage import load_run
        from fiftyone_ecif.samples.pairs import every_sample, pairs_now

        found = load_dataset(dataset)
        results = load_run(found, key, "misalignment")
        counts, learned, proposals = review_or_propose(results, count)
        captions = [caption for _, caption in pairs_now(found, results.config.caption_field, proposals).values()]
        view = every_sample(found).select(proposals, ordered=True)
        ids, scores, reasons = view.values(["id", f"{key}_misalignment", f"{key}_reason"])
        result = {
            "dataset": dataset,
            "key": key,
            "aligned": counts.aligned,
            "misaligned": counts.misaligned,
            **{name: getattr(learned, name, None) for name in ("auroc", "auroc_low", "auroc_high", "expected")},
            "proposals": [
                dict(zip(("id", "misalignment", "caption", "reason"), row, strict=True))
                for row in zip(ids, scores, captions, reasons, strict=True)
            ],
        }
    print_result(result, as_json, _review_report)


def _review_report(result: dict[str, Any]) -> str:
    lines = [f"Tagged so far: {result['aligned']} aligned, {result['misaligned']} misaligned."]
    if result["auroc"] is None:
        lines.append(f"Tag at least {LEAST} pairs {ALIGNED!r} and {LEAST} {MISALIGNED!r}, then run this again.")
    else:
        lines.append(
            f"AUROC {result['auroc']:.3f} ({result['auroc_low']:.3f} to {result['auroc_high']:.3f}). "
            f"About {result['expected']:.0f} pairs are misaligned. {result['key']}_misalignment is now the probability."
        )
    lines += ["", "Misalignment  Pair                      Caption"]
    lines += [f"{one['misalignment']:12.3f}  {one['id']}  {one['caption']}" for one in result["proposals"]]
    return "\n".join(lines)
