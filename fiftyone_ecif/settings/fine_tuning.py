"""Options of fine-tuning a model."""

from __future__ import annotations

from dataclasses import dataclass

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.settings.influence import InfluenceSettings
from fiftyone_ecif.settings.job import JobSettings
from fiftyone_ecif.settings.option import Settings, option, same


@dataclass(frozen=True)
class FitSettings(Settings):
    """What a fine-tuned model depends on beside the pairs: the options of :func:`fiftyone_ecif.fit_model`."""

    caption_field: str = same(InfluenceSettings, "caption_field")
    model: str = same(InfluenceSettings, "model")
    pretrained: str | None = same(InfluenceSettings, "pretrained")
    scope: str = option(
        "lora",
        "the parameters to train: lora[:RANK[:BLOCKS]], blocks:K or a regular expression over parameter names",
        label="Scope",
    )
    spare_equal: bool = same(
        InfluenceSettings,
        "spare_equal",
        help="whether pairs that share their image or their caption are not each other's negatives in the loss",
    )
    epochs: int = option(5, "how often each pair is seen", label="Epochs", least=1)
    batch_size: int = option(64, "pairs that compete in one softmax, at most", label="Batch size", least=2)
    learning_rate: float = option(1e-3, "the highest, after the warm-up", label="Learning rate", above=0.0)
    weight_decay: float = option(
        0.0, "of the trained parameters to zero; decoupled from the loss, as in AdamW", label="Weight decay", least=0.0
    )
    seed: int = option(0, "fixes new adapters and all batches", label="Seed", least=0)
    skip_failures: bool = same(JobSettings, "skip_failures")

    def __post_init__(self) -> None:
        super().__post_init__()
        if parse_scope(self.scope).heads:
            raise EcifError(
                f"scope={self.scope!r} is not for fine-tuning: compute_influence(fit=True) brings heads to their "
                "minimum. Use scope='lora', 'blocks:1' or a regular expression over parameter names"
            )
