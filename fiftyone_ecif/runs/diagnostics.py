"""What a run's diagnostics mean: how far its numbers can be trusted, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.misalignment.judgement import TRUSTED
from fiftyone_ecif.misalignment.noise_rate import NoiseRate

_FAR_FROM_STATIONARY = 0.01  # relative gradient norm
_REACHED = 1e-3  # likewise, of a fit
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
        *_model(found),
        *([judge_fit(config, found)] if _needs_minimum(config) else []),
        *_curvature(config, found),
        *_target(found),
        *_stored(found),
        *_misalignment(found),
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


def _needs_minimum(config: Any) -> bool:
    """Whether the run's scores are about a model at a minimum: not those of most detectors."""
    detector: str = getattr(config, "detector", "")
    return detector not in DETECTORS or DETECTORS[detector].needs_training


def _model(found: dict[str, Any]) -> list[Remark]:
    remarks = [Remark(False, note) for note in found.get("model_notes", ())]
    return [*remarks, *([Remark(True, f"Computed on {found['computed_on']}")] if "computed_on" in found else [])]


def judge_fit(config: Any, found: dict[str, Any]) -> Remark:
    """Judges how far the model is from a minimum of the pairs' loss.

    Args:
        config: of the run.
        found: its diagnostics.
    """
    norm = found["relative_gradient_norm"]
    if config.fit and norm > _REACHED:
        return Remark(
            False,
            f"The fit reached no minimum of these pairs' loss (relative gradient norm {norm:.2g}, 0 is ideal) and "
            "stopped before an embedding shrank to nothing. The curvature is damped where it is negative: influence "
            "is a rougher estimate. A larger proximal helps",
        )
    if norm > _FAR_FROM_STATIONARY:
        return Remark(
            False,
            "The model is not at a stationary point of these pairs' loss (relative gradient norm "
            f"{norm:.2g}, 0 is ideal), so influence is a rougher estimate. fit=True brings it there",
        )
    return Remark(True, f"The model is at a minimum of these pairs' loss (relative gradient norm {norm:.1g})")


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


def _power(found: dict[str, Any]) -> list[Remark]:
    """How well wrong captions are found whose place is known."""
    if "power" not in found:
        return []  # an old run
    random, subtle = found["power"]["random"], found["power"]["subtle"]
    told = f"found at AUROC {random:.2f} where captions were swapped at random, {subtle:.2f} where for a similar one"
    if random < TRUSTED:
        return [Remark(False, f"This run hardly tells wrong captions from right ones: known ones are {told}")]
    if subtle < TRUSTED:
        return [Remark(False, f"Subtle mistakes are hardly found: known wrong captions are {told}")]
    return [Remark(True, f"Known wrong captions are {told}")]


def _misalignment(found: dict[str, Any]) -> list[Remark]:
    if "noise_rate" not in found:
        return []
    rate = NoiseRate(*found["noise_rate"])
    remarks = [Remark(rate.told, str(rate)), *_power(found)]
    if found.get("seen"):
        remarks.append(
            Remark(
                True,
                "The loaded weights know these pairs by heart, so what they say was left out: heads were made without "
                "each pair",
            )
        )
    copies = {kind: count for kind, count in found["duplicates"].items() if count}
    if copies:
        counted = ", ".join(f"{count:,} by {kind}" for kind, count in copies.items())
        remarks.append(Remark(True, f"Duplicates were found and not held against each other: {counted}"))
    return remarks
