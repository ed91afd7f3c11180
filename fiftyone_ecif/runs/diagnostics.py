"""What a run's diagnostics mean: how far its numbers can be trusted, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_FAR_FROM_STATIONARY = 0.01  # relative gradient norm
_POORLY_CACHED = 0.5  # correlation of scores and stored gradients
_SHARED = 0.01  # of the target pairs
_LEAKED = 0.5  # of the target pairs, more of which among the scored ones make scores worthless
_OUTDATED = 0.25  # of the scored pairs


class Remark(NamedTuple):
    """One thing to know of a run.

    Attributes:
        fine: whether it speaks for the numbers.
        text: what it is, and what to do if it is not fine; a sentence.
    """

    fine: bool
    text: str


def diagnose(config: Any, found: dict[str, Any]) -> list[Remark]:
    """Judges a run by its diagnostics.

    Args:
        config: of an influence or misalignment run.
        found: its diagnostics, see :func:`fiftyone_ecif.compute_influence` and
            :func:`fiftyone_ecif.compute_misalignment`.

    Returns:
        what speaks against the numbers first
    """
    remarks = [
        *_fit(found),
        *_curvature(config, found),
        *_target(found),
        *_stored(found),
        *_misalignment(config, found),
    ]
    return sorted(remarks, key=lambda remark: remark.fine)


class Verdict(NamedTuple):
    """What to think of a run, in a sentence.

    Attributes:
        trust: ``"trust"``, ``"care"`` or ``"do not"``.
        title: the same, to be read.
        why: a sentence or two.
    """

    trust: str
    title: str
    why: str


def judge(remarks: Sequence[Remark], found: Mapping[str, Any], pairs: int, stale: Any) -> Verdict:
    """How far to trust a run.

    Args:
        remarks: of :func:`diagnose`.
        found: its diagnostics.
        pairs: how many were scored.
        stale: of :func:`fiftyone_ecif.runs.manage.staleness`, which counts what happened to them since.
    """
    since = (stale.changed or 0) + stale.deleted
    if since > _OUTDATED * pairs:
        return Verdict("do not", "Do not trust it any more", f"Since it was made: {stale}. Run it again.")
    if found.get("shared_pairs", 0) > _LEAKED * found.get("target_pairs", 0):
        why = next(remark.text for remark in remarks if not remark.fine and "validation pairs" in remark.text)
        return Verdict("do not", "Do not trust it", f"{why}.")
    against = [f"{remark.text}." for remark in remarks if not remark.fine]
    if stale:
        against.append(f"Since it was made: {stale}. Run it again for scores of the pairs as they are now.")
    if against:
        return Verdict("care", "Trust it with care", " ".join(against))
    return Verdict("trust", "Trust it", "Nothing speaks against these numbers.")


def _fit(found: dict[str, Any]) -> list[Remark]:
    norm = found["relative_gradient_norm"]
    if norm > _FAR_FROM_STATIONARY:
        return [
            Remark(
                False,
                "The model is not at a stationary point of these pairs' loss (relative gradient norm "
                f"{norm:.2g}, 0 is ideal), so influence is a rougher estimate. fit=True brings it there",
            )
        ]
    return [Remark(True, f"The model is at a minimum of these pairs' loss (relative gradient norm {norm:.1g})")]


def _curvature(config: Any, found: dict[str, Any]) -> list[Remark]:
    if "solve_residual" not in found:
        return []
    if found.get("damping", 0.0) > config.damping:
        return [
            Remark(
                False,
                f"The curvature is negative in places, so it was damped by {found['damping']:.2g} of its mean and "
                "influence is a rougher estimate. fit=True avoids that",
            )
        ]
    return [Remark(True, f"The curvature was solved to a residual of {found['solve_residual']:.1g}")]


def _target(found: dict[str, Any]) -> list[Remark]:
    target_pairs, shared = found.get("target_pairs"), found.get("shared_pairs", 0)
    if not target_pairs:
        return []
    if shared > _SHARED * target_pairs:
        return [
            Remark(
                False,
                f"{shared:,} of {target_pairs:,} validation pairs were scored too, and look valuable as they help "
                "themselves. Score training pairs only",
            )
        ]
    return [Remark(True, f"Influence is on {target_pairs:,} validation pairs that were kept apart")]


def _stored(found: dict[str, Any]) -> list[Remark]:
    correlation = found.get("cached_correlation")
    if correlation is None:
        return []
    if correlation < _POORLY_CACHED:
        return [
            Remark(
                False,
                f"The stored gradients reproduce these scores poorly (correlation {correlation:.2f}), so tracing is "
                "rough here",
            )
        ]
    return [
        Remark(True, f"The stored gradients, which tracing reads, reproduce the scores (correlation {correlation:.2f})")
    ]


def _misalignment(config: Any, found: dict[str, Any]) -> list[Remark]:
    if "noise_rate" not in found:
        return []
    rate, low, high = found["noise_rate"]
    remarks = [Remark(True, f"About {rate:.0%} of the captions are wrong ({low:.0%} to {high:.0%})")]
    if not found["trained"]:
        remarks.append(Remark(False, "Influence was left out: the model was not trained on these pairs. Set fit=True"))
    if high < 0.01 and not config.trained:
        remarks.append(
            Remark(False, "If the model was trained on these pairs, that share is too low: say trained=True")
        )
    copies = {kind: count for kind, count in found["duplicates"].items() if count}
    if copies:
        counted = ", ".join(f"{count:,} by {kind}" for kind, count in copies.items())
        remarks.append(Remark(True, f"Duplicates were found and not held against each other: {counted}"))
    return remarks
