"""One attribution job in one library: ``python library_jobs.py NAME`` prints its CPU seconds.

The job: two linear heads on features, ``(512, 128)`` each; scores of 512 training
pairs, in batches of 128, on the losses of 32 queries. Libraries that hook layers get
the batch's contrastive loss; those that differentiate sample by sample get a loss in
which the negatives are constants, because they know no other. None of the libraries
computes what a removal changes. Imports of nothing but torch and the library, so that
it runs in the library's environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

PAIRS, QUERIES, BATCH, WIDTH, EMBEDDING, RANK = 512, 32, 128, 128, 64, 16
SCALE = 20.0
OURS = ("ecif", "ecif with LoGra's covariance", "hook LoGra")


class Heads(nn.Module):
    """Both projections; its output are the logits of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(WIDTH, EMBEDDING, bias=False)
        self.text = nn.Linear(WIDTH, EMBEDDING, bias=False)

    @override
    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return SCALE * normalize(self.image(images), dim=1) @ normalize(self.text(texts), dim=1).T


def pair_losses(logits: Tensor) -> Tensor:
    """Both directions, shape ``(n,)``."""
    return logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()


def job() -> tuple[Heads, TensorDataset, TensorDataset]:
    """The heads, the training pairs and the queries."""
    torch.manual_seed(0)
    shown = torch.randn(PAIRS + QUERIES, WIDTH)
    texts = shown + 0.5 * torch.randn_like(shown)
    heads = Heads().eval()
    heads.text.load_state_dict(heads.image.state_dict())
    return heads, TensorDataset(shown[:PAIRS], texts[:PAIRS]), TensorDataset(shown[PAIRS:], texts[PAIRS:])


def _ecif(heads: Heads, train: TensorDataset, queries: TensorDataset, solver: str = "hessian") -> Any:
    from fiftyone_ecif.influence.cached_gradients import CachedGradients
    from fiftyone_ecif.influence.damping import damped
    from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
    from fiftyone_ecif.influence.objective import ContrastiveLoss
    from fiftyone_ecif.influence.projections import principal_projection
    from fiftyone_ecif.influence.solvers import SOLVERS

    scope = HeadScope(heads.image.weight.detach().T, heads.text.weight.detach().T, SCALE)
    images, texts = train.tensors
    batches = FeatureBatches(images, texts, torch.split(torch.arange(PAIRS), BATCH))
    projection = principal_projection(scope, scope.start, batches, RANK)
    roles = [projection.removal_gradients(scope.start, batch) for batch in batches]
    positive, negative = (torch.cat(each).numpy() for each in zip(*roles, strict=True))
    chosen = SOLVERS[solver]
    if chosen.solves:
        objective = ContrastiveLoss(scope, batches, PAIRS, 1.0)
        curvature = damped(chosen.projected_curvature(projection, objective, scope.start).numpy())
    else:
        curvature = chosen.stored_curvature([positive + negative])
    asked = tuple(part.double() for part in queries.tensors)
    targets = projection.jacobian(lambda scope, at: pair_losses(scope.similarity(at, asked)), scope.start)
    parts = CachedGradients(positive, negative, curvature, PAIRS).influence(targets.numpy())
    return parts[0] + parts[1]


def _hooks(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    sides = [torch.randn(size, RANK) for size in (WIDTH, EMBEDDING)]

    def gradients(images: Tensor, texts: Tensor) -> Tensor:
        outputs = heads.image(images), heads.text(texts)
        loss = pair_losses(SCALE * normalize(outputs[0], dim=1) @ normalize(outputs[1], dim=1).T).sum()
        slopes = torch.autograd.grad(loss, outputs)
        found = [
            torch.einsum("na,nb->nab", inputs @ sides[0], slope @ sides[1]).flatten(1)
            for inputs, slope in zip((images, texts), slopes, strict=True)
        ]
        return torch.cat(found, dim=1)

    rows = torch.cat([gradients(*batch) for batch in DataLoader(train, BATCH)])
    covariance = rows.T @ rows / len(rows)
    covariance += 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance))
    return gradients(*queries.tensors) @ torch.linalg.solve(covariance, rows.T)


def _logix(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    import logix

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(f"root_dir: {folder}\nlora:\n  rank: {RANK}\n")
        tool = logix.LogIX("speed", config=str(Path(folder) / "config.yaml"))
        tool.watch(heads)
        scheduler = logix.LogIXScheduler(tool, lora="random", hessian="raw", save="grad")
        for _ in scheduler:
            for number, (images, texts) in enumerate(DataLoader(train, BATCH)):
                with tool(data_id=[str(number * BATCH + row) for row in range(len(images))]):
                    heads.zero_grad()
                    torch.autograd.backward(pair_losses(heads(images, texts)).sum())
            tool.finalize()
        logs = tool.build_log_dataloader()
        tool.eval()
        with tool(data_id=[f"query {row}" for row in range(QUERIES)]):
            heads.zero_grad()
            torch.autograd.backward(pair_losses(heads(*queries.tensors)).sum())
        return tool.compute_influence_all(tool.get_log(), logs)


def _frozen(heads: Heads, train: TensorDataset) -> tuple[Tensor, Tensor]:
    """Unit embeddings of a batch, as constants."""
    images, texts = train.tensors
    with torch.no_grad():
        return normalize(heads.image(images[:BATCH]), dim=1), normalize(heads.text(texts[:BATCH]), dim=1)


def _own_output(at: dict[str, Tensor], image: Tensor, text: Tensor, bank: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of one pair against constants, a scalar."""
    u = normalize(at["image.weight"] @ image, dim=0)
    v = normalize(at["text.weight"] @ text, dim=0)
    return (SCALE * bank[1] @ u).logsumexp(0) + (SCALE * bank[0] @ v).logsumexp(0) - 2 * SCALE * (u @ v)


def _dattri_logra(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    class WithLoss(Heads):  # two inputs go in as a dict, and then the model itself is to return the loss
        def forward(self, images: Tensor, texts: Tensor) -> Any:
            return SimpleNamespace(loss=pair_losses(super().forward(images, texts)).sum())

    def named(pairs: TensorDataset, size: int) -> Any:
        rows: Any = [{"images": image, "texts": text} for image, text in zip(*pairs.tensors, strict=True)]
        return DataLoader(rows, size)

    task = AttributionTask(
        loss_func=lambda model, batch, device: model(**batch).loss,
        model=WithLoss().eval(),
        checkpoints=heads.state_dict(),
    )
    tool = LoGraAttributor(task=task, hessian="eFIM", damping=0.1, proj_dim=RANK * RANK)
    tool.cache(named(train, BATCH))
    return tool.attribute(named(train, BATCH), named(queries, QUERIES))


def _dattri_trak(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    bank = _frozen(heads, train)

    def loss(params: Any, data: Any) -> Tensor:
        image, text = (part.squeeze(0) for part in data)
        return _own_output(params, image, text, bank)

    task = AttributionTask(loss_func=loss, model=heads, checkpoints=heads.state_dict())
    tool = TRAKAttributor(
        task=task,
        correct_probability_func=lambda params, data: (-loss(params, data) / 2).exp(),
        projector_kwargs={"proj_dim": 2 * RANK * RANK, "proj_max_batch_size": 32, "device": "cpu"},
        regularization=0.1,
    )
    with torch.no_grad():
        tool.cache(DataLoader(train, BATCH))
        return tool.attribute(DataLoader(queries, QUERIES))


def _kronfluence(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Contrastive(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return pair_losses(model(*batch)).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return pair_losses(model(*batch)).sum()

    task = Contrastive()
    with tempfile.TemporaryDirectory() as folder:
        tool = Analyzer("speed", prepare_model(heads, task), task, cpu=True, output_dir=folder, disable_tqdm=True)
        tool.fit_all_factors("factors", train, per_device_batch_size=BATCH)
        tool.compute_pairwise_scores(
            "scores", "factors", queries, train, per_device_query_batch_size=QUERIES, per_device_train_batch_size=BATCH
        )
        return tool.load_pairwise_scores("scores")["all_modules"]


def _trak(heads: Heads, train: TensorDataset, queries: TensorDataset) -> Any:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    bank = _frozen(heads, train)

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, image: Tensor, text: Tensor) -> Tensor:
            return -_own_output(weights, image, text, bank)

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    size, rank = sum(value.numel() for value in heads.parameters()), 2 * RANK * RANK
    with tempfile.TemporaryDirectory() as folder:

        def tool() -> Any:  # one for each half: it frees its projection after the first
            projector = BasicProjector(size, rank, 0, ProjectionType.normal, "cpu", block_size=rank)
            return TRAKer(
                model=heads, task=Output(), train_set_size=PAIRS, save_dir=folder, device="cpu", projector=projector
            )

        first = tool()
        first.load_checkpoint(heads.state_dict(), model_id=0)
        for batch in DataLoader(train, BATCH):
            first.featurize(batch=batch, num_samples=len(batch[0]))
        first.finalize_features()
        second = tool()
        second.start_scoring_checkpoint("speed", heads.state_dict(), model_id=0, num_targets=QUERIES)
        second.score(batch=queries.tensors, num_samples=QUERIES)
        return second.finalize_scores("speed")


JOBS: dict[str, Callable[[Heads, TensorDataset, TensorDataset], Any]] = {
    "ecif": _ecif,
    "ecif with LoGra's covariance": partial(_ecif, solver="logra"),
    "hook LoGra": _hooks,
    "LogIX": _logix,
    "dattri LoGra": _dattri_logra,
    "dattri TRAK": _dattri_trak,
    "kronfluence EK-FAC": _kronfluence,
    "TRAK": _trak,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    made = job()
    JOBS[sys.argv[1]](*made)  # once for imports and what is compiled
    start = time.process_time()
    scores = JOBS[sys.argv[1]](*job())
    print(json.dumps({"cpu_seconds": time.process_time() - start}))
