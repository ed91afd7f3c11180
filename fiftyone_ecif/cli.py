"""The command line: the plugin's jobs from a shell.

Results go to stdout, progress and messages to stderr. Exit code 1: the job
failed; 2: the command was misused.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .bench.commands import bench
from .choices import DETECTORS, ROLES, SOLVERS, TARGET_LOSSES
from .console import AS_JSON, job, print_result
from .errors import EcifError
from .verdicts import ALIGNED, LEAST, MISALIGNED, review_or_propose

if TYPE_CHECKING:
    from .ranks import Ranks


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Which image-caption pairs help a CLIP-style model, which hurt it, and why."""


main.add_command(bench)


@main.command()
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
        from .demo import open_demo, run_demo

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
@click.option("--target-loss", type=click.Choice(TARGET_LOSSES), default="contrastive", show_default=True)
@click.option("--label-field", help="The target's classes, for zero_shot.")
@click.option("--template", "templates", multiple=True, default=["a photo of a {}."], help="A prompt of a class.")
@click.option("--scope", default="heads", show_default=True, help="heads, lora:RANK, blocks:K or a pattern.")
@click.option("--role", type=click.Choice(ROLES), default="exact", show_default=True, help="The pair's part.")
@click.option("--solver", type=click.Choice(SOLVERS), help="The curvature; by default what suits the scope.")
@click.option("--damping", default=0.0, show_default=True, help="Of the curvature, relative to its mean eigenvalue.")
@click.option("--fit", is_flag=True, help="Bring the scope to a stationary point first.")
@click.option("--proximal", default=1.0, show_default=True, help="Pull to the loaded weights.")
@click.option("--batch-size", type=int, help="Pairs that compete in one softmax.")
@click.option("--seed", default=0, show_default=True, help="Which pairs share a batch.")
@click.option("--partitions", "n_partitions", default=1, show_default=True, help="Partitions to average over.")
@click.option(
    "--score", "scores", multiple=True, help="Also write relative_influence, self_influence or leave_one_out_loss."
)
@click.option("--keep-gradients", is_flag=True, default=None, help="Keep what trace needs, also if scope is not heads.")
@click.option("--device", help="cpu or cuda.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be scored.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same key.")
@AS_JSON
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

    Several processes share the work: torchrun --nproc-per-node 4 -m fiftyone_ecif score ...
    """
    if not (target_tags or target_view):
        raise click.UsageError("Say what to measure influence on: --target-tag or --target-view")
    with job(shared=True):
        from .ranks import join

        ranks = join()
        found = _load_in_turn(dataset, ranks)
        from .api import compute_influence  # brings FiftyOne

        results = compute_influence(
            _narrow(found, tags, view),
            target=_narrow(found, target_tags, target_view),
            brain_key=key,
            skip_failures=not strict,
            progress=None if ranks.first else False,
            **options,
        )
        result = {
            "dataset": dataset,
            "key": key,
            "scored": len(results.ids),
            "skipped": results.skipped,
            "diagnostics": results.diagnostics,
        }
        ranks.wait()  # FiftyOne's database can go when the process that started it ends
    if ranks.first:
        print_result(
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
@AS_JSON
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
    with job():
        from .tuning import fit_model

        result = fit_model(_narrow(_load(dataset), tags, view), path, skip_failures=not strict, **options)
    print_result(
        result,
        as_json,
        lambda r: (
            f"Trained {r['parameters']} parameters on {r['pairs']} pairs of {dataset!r}, skipped {len(r['skipped'])}. "
            f"Mean pair loss {r['loss_before']:.3f} before, {r['loss_after']:.3f} after. Checkpoint: {r['checkpoint']}"
        ),
    )


@main.command()
@click.argument("dataset")
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--model", default="ViT-B-32", show_default=True, help="An open_clip model.")
@click.option("--pretrained", help="A pretrained tag of the model, or the path of a checkpoint.")
@click.option("--tag", "tags", multiple=True, help="Look at samples with this tag only.")
@click.option("--view", help="Look at this saved view only.")
@click.option("--key", default="audit", show_default=True, help="Names the run and its fields.")
@click.option("--detector", type=click.Choice(DETECTORS), default="fused", show_default=True, help="What the score is.")
@click.option("--fit/--no-fit", default=True, show_default=True, help="Fit the heads to the pairs first.")
@click.option("--trained", is_flag=True, help="Say that the weights were trained on these pairs.")
@click.option(
    "--target-tag", "target_tags", multiple=True, help="Validation pairs with this tag, for global_influence."
)
@click.option("--target-view", help="Validation pairs of this saved view, for global_influence.")
@click.option("--mark", metavar="TAG", help="Give the most suspicious pairs this tag, such as suspect.")
@click.option("--share", type=float, help="Which share of the pairs to mark; by default the estimated noise rate.")
@click.option("--threshold", type=float, help="Mark all pairs above this score instead.")
@click.option("--proximal", default=1.0, show_default=True, help="Pull to the loaded weights.")
@click.option("--batch-size", type=int, help="Pairs that compete in one softmax.")
@click.option("--seed", default=0, show_default=True, help="Fixes partitions and folds.")
@click.option("--device", help="cpu or cuda.")
@click.option("--strict", is_flag=True, help="Fail at the first sample that cannot be scored.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same key.")
@AS_JSON
def misalignment(
    dataset: str,
    tags: tuple[str, ...],
    view: str | None,
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
    """
    with job():
        from .misalignment import compute_misalignment

        found = _load(dataset)
        results = compute_misalignment(
            _narrow(found, tags, view),
            target=_narrow(found, target_tags, target_view) if target_tags or target_view else None,
            brain_key=key,
            tag=mark,
            skip_failures=not strict,
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
    print_result(result, as_json, lambda r: _misalignment_report(r, mark))


def _misalignment_report(result: dict[str, Any], mark: str | None) -> str:
    rate = result["noise_rate"]
    lines = [
        f"Scored {result['scored']} pairs of {result['dataset']!r}, skipped {len(result['skipped'])}. "
        f"Field: {result['key']}_misalignment",
        f"About {rate['rate']:.0%} of the captions are wrong ({rate['low']:.0%} to {rate['high']:.0%}).",
    ]
    if mark:
        lines.append(f"Tagged {result['tagged']} pairs as {mark!r}.")
    return "\n".join(lines)


@main.command()
@click.argument("dataset")
@click.option("--key", default="audit", show_default=True, help="The run of misalignment.")
@click.option("--count", default=20, show_default=True, help="Pairs to propose.")
@AS_JSON
def review(dataset: str, key: str, count: int, as_json: bool) -> None:
    """Refit a run on DATASET to the pairs tagged aligned or misaligned, and propose pairs to look at next.

    Example: fiftyone-ecif review my-pairs --count 20
    """
    with job():
        from .catalogue import load_run
        from .samples import every_sample, pairs_now

        found = _load(dataset)
        results = load_run(found, key, "misalignment")
        verdicts, learned, proposals = review_or_propose(results, count)
        captions = [caption for _, caption in pairs_now(found, results.config.caption_field, proposals).values()]
        view = every_sample(found).select(proposals, ordered=True)
        ids, scores, reasons = view.values(["id", f"{key}_misalignment", f"{key}_reason"])
        result = {
            "dataset": dataset,
            "key": key,
            "aligned": verdicts.aligned,
            "misaligned": verdicts.misaligned,
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


@main.command()
@click.argument("dataset")
@click.option("--field", default="ecif_influence", show_default=True, help="The score.")
@click.option(
    "--direction", type=click.Choice(["harmful", "valuable", "suspicious"]), default="harmful", show_default=True
)
@click.option("--count", type=int, help="How many pairs.")
@click.option("--share", type=float, help="Which share of the scored pairs.")
@click.option("--threshold", type=float, help="All pairs beyond this score.")
@click.option("--tag", help="The tag; by default the direction.")
@AS_JSON
def tag(dataset: str, field: str, direction: str, tag: str | None, as_json: bool, **limit: Any) -> None:
    """Tag the most harmful or the most valuable pairs of DATASET.

    Example: fiftyone-ecif tag my-pairs --count 100
    """
    with job():
        from .curation import tag_by_influence

        view = tag_by_influence(_load(dataset), field, tag, direction, **limit)
        result = {"dataset": dataset, "tag": tag or direction, "tagged": len(view)}
    print_result(result, as_json, lambda r: f"Tagged {r['tagged']} pairs of {dataset!r} as {r['tag']!r}")


@main.command()
@click.argument("dataset")
@click.argument("path")
@click.option("--tag", "tags", multiple=True, help="Export samples with this tag only.")
@click.option("--view", help="Export this saved view only.")
@click.option("--caption-field", default="caption", show_default=True, help="The string field of the captions.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@AS_JSON
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
    with job():
        from .curation import export_pairs

        count = export_pairs(_narrow(_load(dataset), tags, view), path, caption_field, overwrite=overwrite)
    print_result(
        {"dataset": dataset, "path": path, "exported": count}, as_json, lambda r: f"Exported {count} pairs to {path}"
    )


@main.command()
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
        from .catalogue import load_run
        from .tracing import trace as find

        found = _load(dataset)
        traces = find(load_run(found, key), **options)
        texts = _captions(found, key, traces)
        result = [
            {
                **one._asdict(),
                "culprits": [culprit._asdict() for culprit in one.culprits],
                "helpers": [helper._asdict() for helper in one.helpers],
                "neighbours": [neighbour._asdict() for neighbour in one.neighbours],
            }
            for one in traces
        ]
    print_result(result, as_json, lambda r: _trace_report(r, texts))


def _captions(dataset: Any, key: str, traces: Any) -> dict[str, str]:
    """Captions of the training pairs that traces name, or what became of them."""
    from .samples import pairs_now

    config = dataset.get_brain_info(key).config
    named = [pair.id for one in traces for pair in (*one.culprits, *one.helpers, *one.neighbours)]
    there = pairs_now(dataset, config.caption_field, named)
    return {sample: there[sample][1] or "(no caption)" if sample in there else "(deleted)" for sample in named}


def _trace_report(traces: list[dict[str, Any]], captions: dict[str, str]) -> str:
    if not traces:
        return "No mistakes."
    lines = []
    for one in traces:
        lines += ["", f"{one['id']}, loss {one['loss']:.3f}", "  Relative influence  Culprit                   Caption"]
        lines += [f"  {c['relative_influence']:18.2e}  {c['id']}  {captions[c['id']]}" for c in one["culprits"]]
        lines += ["  Relative influence  Helper                    Caption"]
        lines += [f"  {h['relative_influence']:18.2e}  {h['id']}  {captions[h['id']]}" for h in one["helpers"]]
        lines += ["          Similarity  Neighbour                 Caption"]
        lines += [f"  {n['similarity']:18.3f}  {n['id']}  {captions[n['id']]}" for n in one["neighbours"]]
    return "\n".join(lines[1:])


@main.command()
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
        from .catalogue import load_run
        from .editing import Edit, edit_model

        if not (tags or view):
            raise click.UsageError("Say what to take out: --tag or --view")
        found = _load(dataset)
        result = edit_model(load_run(found, key), _narrow(found, tags, view), path, **options)._asdict()
    print_result(result, as_json, lambda r: str(Edit(**r)))


@main.command()
@click.argument("dataset")
@click.argument("key", required=False)
@AS_JSON
def runs(dataset: str, key: str | None, as_json: bool) -> None:
    """List the runs on DATASET, with their size on disk and what changed since, or describe the run KEY.

    Example: fiftyone-ecif runs my-pairs
    """
    with job():
        from .catalogue import describe_run, list_runs, staleness

        found = _load(dataset)
        about = describe_run(found, key) if key else ""
        entries = [run for run in list_runs(found) if key in (None, run.key)]
        stale = [staleness(found, run.key) for run in entries]
        result = {
            "dataset": dataset,
            "runs": [
                {**run._asdict(), "when": f"{run.when.isoformat()}Z", "stale": since._asdict()}
                for run, since in zip(entries, stale, strict=True)
            ],
        }
    print_result(result, as_json, lambda r: about or _runs_report(r["runs"], [str(since) for since in stale]))


def _runs_report(runs: list[dict[str, Any]], stale: list[str]) -> str:
    from .catalogue import size_text

    if not runs:
        return "No runs."
    width = max(len(run["key"]) for run in runs)
    lines = [f"{'Key':<{width}}  Kind          Made (UTC)          Pairs       Cache  Model         Since then"]
    for run, since in zip(runs, stale, strict=True):
        pairs = "stopped" if run["scored"] is None else f"{run['scored']:,}"
        lines.append(
            f"{run['key']:<{width}}  {run['kind']:<12}  {run['when'][:16].replace('T', ' ')}  {pairs:>7}  "
            f"{size_text(run['cache_bytes']):>10}  {run['model']:<12}  {since}"
        )
    return "\n".join(lines)


@main.command("rename-run")
@click.argument("dataset")
@click.argument("key")
@click.argument("new_key")
@AS_JSON
def rename(dataset: str, key: str, new_key: str, as_json: bool) -> None:
    """Rename the run KEY on DATASET, and its fields with it.

    Example: fiftyone-ecif rename-run my-pairs ecif first_try
    """
    with job():
        from .catalogue import rename_run

        rename_run(_load(dataset), key, new_key)
    print_result(
        {"dataset": dataset, "key": new_key}, as_json, lambda _: f"The run {key!r} of {dataset!r} is now {new_key!r}"
    )


@main.command("delete-run")
@click.argument("dataset")
@click.argument("key")
@AS_JSON
def delete(dataset: str, key: str, as_json: bool) -> None:
    """Delete the run KEY on DATASET with its fields, and its cache unless another run uses it.

    Example: fiftyone-ecif delete-run my-pairs ecif
    """
    with job():
        from .catalogue import delete_run

        gone = delete_run(_load(dataset), key)
    print_result(
        {"dataset": dataset, "key": key, **gone._asdict()},
        as_json,
        lambda _: f"Deleted the run {key!r} of {dataset!r}, with {gone}",
    )


@main.command()
@click.option("--free", is_flag=True, help="Delete caches of deleted datasets, and what stopped jobs left.")
@AS_JSON
def cache(free: bool, as_json: bool) -> None:
    """Say how much disk the cache takes and how much of it nothing uses, and free that.

    Example: fiftyone-ecif cache --free
    """
    with job():
        from .catalogue import cache_size, free_disk, size_text, unused_size
        from .store import cache_folder

        freed = free_disk() if free else 0
        result = {"folder": str(cache_folder()), "bytes": cache_size(), "unused": unused_size(), "freed": freed}
    print_result(
        result,
        as_json,
        lambda r: (
            f"{r['folder']}: {size_text(r['bytes'])}, "
            + (f"{size_text(freed)} freed" if free else f"{size_text(r['unused'])} of it not used by anything")
        ),
    )


@main.group()
def plugin() -> None:
    """The FiftyOne plugin."""


@plugin.command()
@AS_JSON
def install(as_json: bool) -> None:
    """Make FiftyOne find the plugin, from a pip install or a clone."""
    with job():
        from .install import install_plugin

        place = str(install_plugin())
    print_result(
        {"plugin": place}, as_json, lambda r: f"FiftyOne finds the plugin at {place}. Restart the App if it runs"
    )


@main.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Say what this machine has, what it lacks and how to get it."""
    with job():
        from .health import examine

        checks = examine()
        usable = all(check.ok for check in checks if check.required)
    print_result(
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


def _load_in_turn(name: str, ranks: Ranks) -> Any:
    """As :func:`_load`, in the first process first: it starts FiftyOne's database, which the others join."""
    if not ranks.first:
        logging.getLogger("fiftyone_ecif").setLevel(logging.ERROR)
        ranks.wait()
    found = _load(name)
    if ranks.first:
        ranks.wait()
    return found


def _narrow(dataset: Any, tags: tuple[str, ...], view: str | None) -> Any:
    if view is not None and not dataset.has_saved_view(view):
        known = ", ".join(dataset.list_saved_views()) or "none"
        raise EcifError(f"{dataset.name!r} has no saved view {view!r}. Saved views: {known}")
    samples = dataset.load_saved_view(view) if view else dataset.view()
    return samples.match_tags(list(tags)) if tags else samples
