"""What the Influence panel remembers, and what it reads of the dataset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from fiftyone_ecif.samples.pairs import every_sample, pairs_now

#: The pages by name, with their titles.
PAGES = {
    "overview": "Overview",
    "ranking": "Ranking",
    "pair": "Pair",
    "trace": "Trace",
    "review": "Review",
    "run": "Run",
}
_OF_KIND = {"review": "misalignment", "trace": "influence"}  # pages of one kind of run only


def get(ctx: Any, name: str) -> Any:
    """What the panel remembers under a name, None if nothing."""
    return ctx.panel.get_state(name)


def current_page(ctx: Any) -> str:
    """The page that is shown; what was remembered may not be a page of this run."""
    page = get(ctx, "page")
    return page if page in pages_of(ctx) else "overview"


def tabs_name(ctx: Any) -> str:
    """Of the tabs: they follow only what is clicked, so that a page or a run with other pages needs other tabs."""
    return f"page_{get(ctx, 'turns') or 0}_{run_config(ctx).type}"


def pages_of(ctx: Any) -> dict[str, str]:
    """The pages that the run that is shown has, with their titles."""
    kind = run_config(ctx).type
    return {name: title for name, title in PAGES.items() if _OF_KIND.get(name, kind) == kind}


def run_id(ctx: Any) -> str:
    """What stays of the run that is shown when it is renamed."""
    return str(ctx.dataset._doc.brain_methods[get(ctx, "key")].id)


def run_keys(ctx: Any) -> list[str]:
    """The runs on the dataset that are written to their end, the newest last."""
    from fiftyone_ecif.runs.manage import finished_runs

    return [] if ctx.dataset is None else finished_runs(ctx.dataset)


def written_fields(ctx: Any) -> dict[str, tuple[str, list[str]]]:
    """Key and fields of each run on the dataset, by what stays when it is renamed."""
    runs = ctx.dataset._doc.brain_methods if ctx.dataset is not None else {}
    return {str(runs[key].id): (key, list(ctx.dataset.get_brain_info(key).config.fields(key))) for key in run_keys(ctx)}


def run_config(ctx: Any) -> Any:
    """The configuration of the run that is shown."""
    return ctx.dataset.get_brain_info(get(ctx, "key")).config


def is_misalignment(ctx: Any) -> bool:
    """Whether the run that is shown is one of misalignment."""
    return bool(run_config(ctx).type == "misalignment")


def run_results(ctx: Any) -> Any:
    """The results of the run that is shown."""
    from fiftyone_ecif.runs.reading import read_results

    return read_results(ctx.dataset, get(ctx, "key"), cache=True)


def score_table(ctx: Any) -> Any:
    """The scores of all runs on the dataset."""
    from fiftyone_ecif.runs.score_table import read_score_table

    return read_score_table(ctx.dataset)


def run_fields(ctx: Any) -> list[str]:
    """The scores that the run that is shown has written."""
    from fiftyone_ecif.runs.score_table import score_fields

    return score_fields(ctx.dataset, get(ctx, "key"), run_config(ctx))


def current_field(ctx: Any) -> str:
    """The score that is shown, "" if none is left; what was remembered may be gone, or belong to another run."""
    fields, field = run_fields(ctx), get(ctx, "field")
    return field if field in fields else next(iter(fields), "")


def current_direction(ctx: Any) -> str:
    """The end of the score that is looked at; what was remembered may belong to another kind of run."""
    if is_misalignment(ctx):
        return "suspicious"
    return "valuable" if get(ctx, "direction") == "valuable" else "harmful"


def current_cut(ctx: Any) -> Any:
    """The pairs that the slider takes."""
    return score_table(ctx).cut(current_field(ctx), current_direction(ctx), (get(ctx, "share") or 0) / 100)


def pairs_of(ctx: Any, ids: list[str]) -> dict[str, tuple[str, str]]:
    """Address of the image and caption of some samples, in their order; without those that are gone."""
    pairs = pairs_now(ctx.dataset, run_config(ctx).caption_field, ids)
    media = ctx.dataset.app_config.grid_media_field or "filepath"
    shown = dict(zip(*every_sample(ctx.dataset).select(list(pairs)).values(["id", media]), strict=True))
    return {
        sample: (f"/media?filepath={quote(shown.get(sample) or path)}", caption or "")
        for sample, (path, caption) in pairs.items()
    }


def values_of(ctx: Any, samples: Iterable[str], field: str) -> dict[str, Any]:
    """The values of a field of some samples; nothing where there is no such field."""
    if not ctx.dataset.has_sample_field(field):
        return {}
    return dict(zip(*every_sample(ctx.dataset).select(list(samples)).values(["id", field]), strict=True))


def plain(text: str) -> str:
    """Text that markdown shows as it is, on one line."""
    kept = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>()#+-!|~" else letter for letter in kept)
