"""Commands that keep house: runs, rename-run, delete-run, cache."""

from __future__ import annotations

from typing import Any

import click

from fiftyone_ecif.cli.console import AS_JSON, job, load_dataset, print_result


@click.command()
@click.argument("dataset")
@click.argument("key", required=False)
@AS_JSON
def runs(dataset: str, key: str | None, as_json: bool) -> None:
    """List the runs on DATASET, with their size on disk and what changed since, or describe the run KEY.

    Example: fiftyone-ecif runs my-pairs
    """
    with job():
        from fiftyone_ecif.runs.describe import describe_run
        from fiftyone_ecif.runs.manage import list_runs, staleness

        found = load_dataset(dataset)
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
    from fiftyone_ecif.runs.cache import size_text

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


@click.command("rename-run")
@click.argument("dataset")
@click.argument("key")
@click.argument("new_key")
@AS_JSON
def rename(dataset: str, key: str, new_key: str, as_json: bool) -> None:
    """Rename the run KEY on DATASET, and its fields with it.

    Example: fiftyone-ecif rename-run my-pairs ecif first_try
    """
    with job():
        from fiftyone_ecif.runs.manage import rename_run

        rename_run(load_dataset(dataset), key, new_key)
    print_result(
        {"dataset": dataset, "key": new_key}, as_json, lambda _: f"The run {key!r} of {dataset!r} is now {new_key!r}"
    )


@click.command("delete-run")
@click.argument("dataset")
@click.argument("key")
@AS_JSON
def delete(dataset: str, key: str, as_json: bool) -> None:
    """Delete the run KEY on DATASET with its fields, and its cache unless another run uses it.

    Example: fiftyone-ecif delete-run my-pairs ecif
    """
    with job():
        from fiftyone_ecif.runs.manage import delete_run

        gone = delete_run(load_dataset(dataset), key)
    print_result(
        {"dataset": dataset, "key": key, **gone._asdict()},
        as_json,
        lambda _: f"Deleted the run {key!r} of {dataset!r}, with {gone}",
    )


@click.command()
@click.option("--free", is_flag=True, help="Delete caches of deleted datasets, and what stopped jobs left.")
@AS_JSON
def cache(free: bool, as_json: bool) -> None:
    """Say how much disk the cache takes and how much of it nothing uses, and free that.

    Example: fiftyone-ecif cache --free
    """
    with job():
        from fiftyone_ecif.runs.cache import cache_size, free_disk, size_text, unused_size
        from fiftyone_ecif.store.files import cache_folder

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
