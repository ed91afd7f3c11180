"""Options of computing influence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.roles import ROLES, parse_role
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.influence.scoring_options import ScoringOptions
from fiftyone_ecif.influence.solvers import SOLVERS, default_solver
from fiftyone_ecif.influence.target_losses import TARGET_LOSSES, find_target_loss
from fiftyone_ecif.settings.option import Settings, option

#: Scores that a run can write beside influence, from the projected gradients.
EXTRA_SCORES = ("relative_influence", "self_influence", "leave_one_out_loss")
PairFunction = Callable[..., Any]
#: Stands for embeddings that were given as arrays.
ARRAYS = ("an array of the user's own", "an array of the user's own")
_FUNCTION = "function "  # what the record of a function of the user's own starts with


@dataclass(frozen=True)
class InfluenceSettings(Settings):
    """What the influence of pairs is computed from: the options of :func:`fiftyone_ecif.compute_influence`.

    What is left to be chosen (``solver``, ``keep_gradients``) is chosen here; only
    ``batch_size`` waits for the number of pairs.

    Attributes:
        function_token: tells two functions of the user's own from each other, which can have one name.
    """

    caption_field: str = option("caption", "the string field that holds the captions", label="Caption field")
    model: str = option("ViT-B-32", "the name of a model, such as one of open_clip's", label="Model")
    pretrained: str | None = option(
        None,
        "a pretrained tag of the model, or the path of a checkpoint; needed unless the model name brings its own "
        "weights (local-dir:..., hf-hub:...)",
        label="Pretrained",
        path=True,
    )
    embeddings: tuple[str, ...] = option(
        (),
        "in place of a model: the names of two fields that hold the embeddings of images and of captions, or in Python "
        "two arrays (n, d) in the order of the samples, or of their whole dataset; any model can have made them. What "
        "is attributed is a linear map behind each",
        label="Embeddings",
        flag="--embedding",
    )
    scale: float = option(
        100.0,
        "with embeddings: what cosines are multiplied with in the loss, the inverse temperature",
        label="Scale of cosines",
        above=0.0,
    )
    target_loss: str | PairFunction = option(
        "contrastive",
        "what is measured on the target: the pairs' own contrastive loss, zero_shot classification by label_field, "
        "retrieval_margin (logit of the strongest wrong match minus that of the right one), or in Python a function "
        "loss(images, captions, logits) of a batch's unit embeddings, (n, d) each, and its similarity matrix (n, n), "
        "returning a loss for each pair, (n,)",
        label="Target loss",
        choices=lambda: TARGET_LOSSES,
        others=True,
    )
    label_field: str | None = option(
        None,
        "a string or Classification field of the target's classes, for zero_shot; the classes are those found in it",
        label="Classes",
    )
    templates: tuple[str, ...] = option(
        ("a photo of a {}.",),
        "prompts of a class, whose embeddings are averaged",
        label="Prompts of a class",
        flag="--template",
    )
    scope: str = option(
        "heads",
        "the parameters to attribute: heads (both final projections), heads+logit_scale, lora[:RANK[:BLOCKS]] "
        "(adapters on attention and MLP weights, of the last BLOCKS blocks), blocks:K (the last K blocks of both "
        "towers), or a regular expression that parameter names are searched for",
        label="Scope",
    )
    role: str = option(
        "exact",
        "how a pair's part in its batch is taken: exact, taylor (the paper's first-order form), positive or negative "
        "alone, or as_printed (the paper's formula as printed, which is wrong; for comparison)",
        label="Role of a pair",
        choices=lambda: ROLES,
    )
    solver: str | None = option(
        None,
        "the curvature; by default the exact Hessian for heads and the Gauss-Newton matrix for deeper scopes",
        label="Curvature",
        choices=lambda: SOLVERS,
    )
    damping: float = option(0.0, "added to the curvature, relative to its mean eigenvalue", label="Damping", least=0.0)
    fit: bool = option(
        False,
        "whether to bring the parameters in scope to a minimum of the pairs' loss first, in memory, starting from the "
        "loaded weights: influence describes a model at a minimum of its loss. Leave it out only for a model that was "
        "trained on exactly these pairs to the end",
        label="Fit the model to these pairs first",
    )
    proximal: float = option(
        1.0,
        "strength of the pull to the loaded weights, in the objective and in its curvature",
        label="Proximal strength",
        above=0.0,
    )
    batch_size: int | None = option(
        None,
        "pairs that compete in one softmax, which scores depend on; by default 256, or all pairs if there are fewer",
        label="Batch size",
        kind=int,
        least=2,
        why_least="leaves no negatives. Use at least 2",
    )
    spare_equal: bool = option(
        False,
        "whether pairs that share their image or their caption are not each other's negatives, in the loss, its "
        "curvature and the roles of pairs; by default they are, as in training",
        label="Equal pairs are no negatives",
    )
    seed: int = option(0, "which pairs share a batch", label="Seed")
    n_partitions: int = option(
        1,
        "how many random partitions into batches to average over; more than one gives a standard error",
        label="Partitions",
        least=1,
        flag="--partitions",
    )
    scores: tuple[str, ...] = option(
        (),
        "further fields to write: relative_influence, self_influence, leave_one_out_loss",
        label="Further scores",
        choices=lambda: EXTRA_SCORES,
        flag="--score",
    )
    keep_gradients: bool | None = option(
        None,
        "whether to store projected gradients, which tracing needs; by default for heads only, where they cost little",
        label="Keep gradients",
        kind=bool,
    )
    gradient_tolerance: float = option(
        0.01,
        "of stored gradients of deep scopes: what their relative error is to stay below, as estimated; 0 for exact "
        "ones, which take many times as long. Those of heads are exact",
        label="Tolerance of kept gradients",
        least=0.0,
    )
    function_token: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        choice = parse_scope(self.scope)
        if self.embeddings:
            self._set("model", check_embeddings(self.embeddings, self.pretrained))
            if not choice.heads:
                raise EcifError(f"scope={self.scope!r} needs a model, not embeddings. Use scope='heads'")
        self._set("solver", self.solver or default_solver(choice))
        if self.function is not None:
            self._set("function_token", self.function_token or uuid4().hex)
        labelled = not self.is_function and find_target_loss(self.target_loss).needs_labels
        if labelled and self.embeddings:
            raise EcifError(
                f"target_loss={self.target_loss!r} encodes prompts, which needs a model, not embeddings. Use "
                "target_loss='contrastive'"
            )
        if labelled != (self.label_field is not None):
            names = " or ".join(repr(name) for name, loss in TARGET_LOSSES.items() if loss.needs_labels)
            raise EcifError(f"target_loss={names} and label_field, the classes of the target, belong together")
        if not self.templates or not all(isinstance(text, str) and "{}" in text for text in self.templates):
            raise EcifError(
                f"templates={list(self.templates)!r} must hold {{}} for the class, as in 'a photo of a {{}}.'"
            )
        if parse_role(self.role).part == "negative" and set(self.scores) & {"self_influence", "leave_one_out_loss"}:
            raise EcifError(
                f"role={self.role!r} leaves out a pair's own loss, which self_influence and others are about"
            )
        needs_gradients = SOLVERS[self.solver or ""].needs_gradients
        needed = bool(self.scores) or needs_gradients
        if self.keep_gradients is False and needed:
            what = "scores" if self.scores else f"solver={self.solver}"
            raise EcifError(f"keep_gradients=False does not go with {what}")
        if self.keep_gradients is None:
            self._set("keep_gradients", choice.heads or needed)

    @property
    def function(self) -> PairFunction | None:
        """The user's own target loss, if it is one and at hand."""
        return self.target_loss if callable(self.target_loss) else None

    @property
    def is_function(self) -> bool:
        """Whether the target loss is a function of the user's own, at hand or only recorded."""
        return callable(self.target_loss) or str(self.target_loss).startswith(_FUNCTION)

    @property
    def scoring(self) -> ScoringOptions:
        """The options of the mathematics among them."""
        assert self.solver is not None
        return ScoringOptions(
            self.fit,
            self.proximal,
            self.role,
            self.solver,
            self.damping,
            bool(self.keep_gradients),
            self.gradient_tolerance,
        )

    @property
    def target_loss_name(self) -> str:
        """The target loss in messages and records."""
        if callable(self.target_loss):
            return _FUNCTION + getattr(self.target_loss, "__name__", "")
        return self.target_loss


def check_embeddings(fields: tuple[str, ...], pretrained: str | None) -> str:
    """Checks what is said of embeddings, which take the place of a model.

    Args:
        fields: the names of the fields that they are in.
        pretrained: the weights of a model.

    Returns:
        what runs are recorded with as their model

    Raises:
        EcifError: if they are not two, or there are weights too
    """
    if len(fields) != 2:
        raise EcifError(
            f"embeddings={list(fields)!r} must be two: where the embeddings of images are, and those of captions"
        )
    if pretrained:
        raise EcifError("embeddings take the place of a model. Leave pretrained out")
    return "embeddings"
