"""What a GPU would refuse or be slow at, on pretended tensors that know their device but hold no numbers.

An operation on tensors of two devices fails, and so does one whose result Python waits for. What a loop over batches
does is tried, as far as it is in closed form or forward mode: a backward pass needs a real device's streams
(``test_on_a_gpu``).
"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fiftyone_ecif.devices import Placement
from fiftyone_ecif.influence.curvature import gauss_newton_at, hessian_at
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.head_gradients import HeadProjection
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.linear_solve import conjugate_gradient
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss
from fiftyone_ecif.influence.projections import KroneckerProjection
from fiftyone_ecif.misalignment import neighbours

PAIRS, WIDTHS, WIDTH = 24, (7, 5), 4


class NoDoubles(TorchDispatchMode):
    """Fails where a float64 is made on a device that has none, or has slow ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.device.type == "cuda":
                raise AssertionError(f"{func} makes a float64 on the device")
        return found


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def device(request, monkeypatch):
    """A pretended GPU, and the precision that is used on it."""
    monkeypatch.setattr(Placement, "room", 2**30)
    with FakeTensorMode(), NoDoubles() if request.param == torch.float32 else nullcontext():
        yield Placement("cuda", request.param)


@pytest.fixture(params=["softmax", "sigmoid", "with scale"])
def problem(request, device):
    loss = SigmoidLoss() if request.param == "sigmoid" else SoftmaxLoss()
    scope = object.__new__(HeadScope)  # its numbers would be looked at
    scope.shapes = tuple(torch.Size((width, WIDTH)) for width in WIDTHS)
    scope.loss, scope.with_scale = loss, request.param == "with scale"
    scope._scale, scope._bias = 10.0, -1.0 if request.param == "sigmoid" else 0.0
    scope.start = torch.randn(sum(WIDTHS) * WIDTH + scope.with_scale, device="cuda", dtype=device.dtype)
    sides = [torch.randn(PAIRS, width, device="cuda") for width in WIDTHS]
    batches = FeatureBatches(*sides, [torch.arange(start, start + 6) for start in range(0, PAIRS, 6)], device)
    return scope, batches, ContrastiveLoss(scope, batches, PAIRS, 0.1)


def test_pretended_tensors_know_what_a_gpu_refuses():
    with FakeTensorMode():
        on_gpu, on_cpu = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        with pytest.raises(RuntimeError, match="device"):
            on_gpu @ on_cpu
        with pytest.raises(DataDependentOutputException):
            on_gpu.sum().item()
        with NoDoubles(), pytest.raises(AssertionError, match="float64"):
            on_gpu.double()


def test_objective(problem):
    scope, _, objective = problem
    for found in (
        objective.gradient_and_value(scope.start)[0],
        hessian_at(objective, scope.start)(scope.start),
        gauss_newton_at(objective, scope.start)(scope.start),
    ):
        assert found.device.type == "cuda"
        assert found.shape == scope.start.shape
    assert objective.loss(scope.start).device.type == "cuda"


def test_scores(problem):
    scope, batches, objective = problem
    for stack, batch in zip(objective.stacks(), objective.own_stacks(), strict=True):
        positive, negative = batch_influence(scope, scope.start, batch, scope.start, PAIRS)
        assert positive.shape == negative.shape == batches.rows(stack).shape
        assert positive.device.type == "cuda"


def test_stored_gradients(problem, device):
    scope, _, objective = problem
    image, text = (
        HeadProjection(*(torch.randn(side, 3, device="cuda", dtype=device.dtype) for side in (width, WIDTH)))
        for width in WIDTHS
    )
    projection = KroneckerProjection(scope, image, text)
    for batch in objective.own_stacks():
        positive, _ = projection.removal_gradients(scope.start, batch)
        assert positive.shape == (*batch[0].shape[:2], projection.rank)
    assert projection.project(projection.lift(torch.randn_like(positive[0, 0]))).device.type == "cuda"


def test_best_of_chunks(device):
    similarity = torch.randn(8, 64 * 40 + 3, device="cuda")
    assert neighbours._top(similarity, 5).indices.device.type == "cuda"


def test_a_solve_looks_at_its_numbers_every_few_steps_only(device):
    right, products = torch.randn(600, device="cuda", dtype=device.dtype), []
    steps = conjugate_gradient(lambda v: (products.append(1), 2 * v)[1], right)
    with pytest.raises(DataDependentOutputException):
        next(steps)
    assert len(products) == device.unwatched > 1
    assert Placement("cpu").unwatched == 1
