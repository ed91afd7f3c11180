"""Options of looking for misaligned pairs."""

from __future__ import annotations

from dataclasses import dataclass

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.misalignment.detectors import DETECTORS
from fiftyone_ecif.settings.influence import InfluenceSettings, check_embeddings
from fiftyone_ecif.settings.option import Settings, option, same

#: Detectors of old runs: these can be read, but not be made again.
RETIRED = ("fused", "trusted_fit")


@dataclass(frozen=True)
class MisalignmentSettings(Settings):
    """What misalignment is computed from: the options of :func:`fiftyone_ecif.compute_misalignment`."""

    caption_field: str = same(InfluenceSettings, "caption_field")
    model: str = same(InfluenceSettings, "model")
    pretrained: str | None = same(InfluenceSettings, "pretrained")
    embeddings: tuple[str, ...] = same(InfluenceSettings, "embeddings")
    scale: float = same(InfluenceSettings, "scale")
    detector: str = option("calibrated", "what the score is", label="Detector", choices=lambda: DETECTORS)
    fit: bool = same(
        InfluenceSettings,
        "fit",
        default=True,
        help="for a detector of influence: whether to fit both final projections to the pairs first, in memory, "
        "starting from the loaded weights; influence tells about pairs that a model was fitted to",
    )
    trained: bool = option(
        False,
        "that the loaded weights were fitted to these very pairs, and so know wrong captions by heart; the run finds "
        "that out by itself where it is not said",
        label="The model was trained on these pairs",
    )
    proximal: float = same(InfluenceSettings, "proximal")
    batch_size: int | None = same(InfluenceSettings, "batch_size")
    seed: int = same(InfluenceSettings, "seed", help="fixes partitions and folds")

    def __post_init__(self) -> None:
        old = self.detector if self.detector in RETIRED else None
        if old:
            self._set("detector", type(self).detector)
        super().__post_init__()
        if self.embeddings:
            self._set("model", check_embeddings(self.embeddings, self.pretrained))
        if old:
            self._set("detector", old)
        elif DETECTORS[self.detector].needs_training and not (self.fit or self.trained):
            raise EcifError(
                f"detector={self.detector!r} tells about pairs that the model was trained on. Set fit=True, or "
                "trained=True if the weights were trained on these pairs"
            )

    @property
    def influence(self) -> InfluenceSettings:
        """The run in terms of influence: its heads, fit and partition."""
        return InfluenceSettings(
            caption_field=self.caption_field,
            model=self.model,
            pretrained=self.pretrained,
            embeddings=self.embeddings,
            scale=self.scale,
            fit=self.fit,
            proximal=self.proximal,
            batch_size=self.batch_size,
            seed=self.seed,
        )
