"""The baselines' gradients against autograd, and each method against a dense twin."""

import numpy as np
import open_clip
import pytest
import torch

from fiftyone_ecif.bench.fidelity import peers
from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.objective import ContrastiveLoss, OneByOne
from fiftyone_ecif.models.tower_scope import TowerScope

PARAMETERS = ["logit_scale", "visual.transformer.resblocks.0.attn.in_proj_weight", "ln_final.bias", "text_projection"]
PARTITION = [torch.tensor([4, 0, 7, 2]), torch.tensor([1, 8, 3]), torch.tensor([6, 5])]


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def heads():
    draw = draws()
    return HeadScope(draw(6, 4), draw(5, 4), 3.0, with_scale=True), (draw(9, 6), draw(9, 5))


def towers(rank=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=8,
            vision_cfg={"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
            text_cfg={"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        )
    scope = TowerScope(
        model.double().eval().requires_grad_(False), PARAMETERS[1::2] if rank else PARAMETERS, SoftmaxLoss(), rank
    )
    if rank:  # new adapters have B = 0, and then no gradient to A
        scope.start = scope.start + 0.1 * draws(1)(len(scope.start))
    captions = torch.randint(1, 20, (9, 6), generator=torch.Generator().manual_seed(0))
    return scope, (draws()(9, 3, 16, 16), captions)


class Batches(OneByOne):
    """As they are: tokens must stay integers."""

    def __init__(self, images, texts, partition):
        self.images, self.texts, self.partition = images, texts, partition

    def regrouped(self, partition):
        return Batches(self.images, self.texts, partition)

    def __getitem__(self, index):
        return self.images[self.partition[index]], self.texts[self.partition[index]]


@pytest.fixture(params=[heads, towers, lambda: towers(rank=2)], ids=["heads", "towers", "lora"])
def model(request):
    return request.param()


@pytest.fixture
def batch(model):
    return tuple(part[:5] for part in model[1])


def detached_similarity(scope, theta, batch, pair):
    """The similarity matrix where the embeddings of all pairs but one are constants."""
    own = (torch.arange(len(batch[0])) == pair)[:, None]
    embeddings = scope.embed_images(theta, batch[0]), scope.embed_captions(theta, batch[1])
    u, v = (torch.where(own, z, z.detach()) for z in (z / z.norm(dim=1, keepdim=True) for z in embeddings))
    return scope.logits(theta, u @ v.T)


def autograd(scope, function):
    theta = scope.start.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def without_scale(scope, gradients):
    """Drops ``logit_scale``, which is the last parameter of the heads and the first of the towers."""
    if isinstance(scope, HeadScope):
        return gradients[..., :-1]
    return gradients[..., 1:] if scope.rank is None else gradients


def test_slices_are_the_tensors(model):
    scope, _ = model
    tensors = [scope.start[start:stop].view(shape) for start, stop, shape in peers.tensor_slices(scope)]
    for got, expected in zip(tensors, scope.split(scope.start), strict=True):
        assert torch.equal(got, expected)


def test_hook_gradients_add_up_to_the_gradient_of_the_batch_loss(model, batch):
    scope, _ = model
    got = peers.hook_gradients(scope, scope.start, batch)
    expected = autograd(scope, lambda theta: SoftmaxLoss().pair_losses(scope.similarity(theta, batch)).sum())
    torch.testing.assert_close(*(without_scale(scope, each) for each in (got.sum(0), expected)))


def test_hook_gradients_equal_autograd_through_one_pair(model, batch):
    scope, _ = model
    got = peers.hook_gradients(scope, scope.start, batch)
    for n, row in enumerate(got):
        expected = autograd(
            scope, lambda theta, n=n: SoftmaxLoss().pair_losses(detached_similarity(scope, theta, batch, n)).sum()
        )
        torch.testing.assert_close(*(without_scale(scope, each) for each in (row, expected)))


def test_hook_gradients_skip_the_scale():
    for scope, data in (heads(), towers()):
        got = peers.hook_gradients(scope, scope.start, data)
        assert got[:, -1 if isinstance(scope, HeadScope) else 0].abs().max() == 0


def test_anchor_gradients_equal_autograd(model, batch):
    scope, _ = model
    got = peers.anchor_gradients(scope, scope.start, batch)
    for n, row in enumerate(got):
        expected = autograd(scope, lambda theta, n=n: SoftmaxLoss().pair_losses(scope.similarity(theta, batch))[n])
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("output", [SoftmaxLoss().pair_losses, peers.trak_output], ids=["loss", "trak"])
def test_frozen_gradients_equal_autograd_with_the_others_detached(model, batch, output):
    scope, _ = model
    got = peers.frozen_gradients(scope, scope.start, batch, output)
    for n, row in enumerate(got):
        expected = autograd(scope, lambda theta, n=n: output(detached_similarity(scope, theta, batch, n))[n])
        torch.testing.assert_close(row, expected)


def test_trak_output_is_the_log_odds_and_its_weight_their_mean_slope():
    similarity = 2 * draws()(5, 5)
    p = torch.stack([similarity.softmax(1).diagonal(), similarity.softmax(0).diagonal()])
    odds = (p / (1 - p)).log().requires_grad_()
    torch.testing.assert_close(peers.trak_output(similarity), odds.detach().sum(0))
    (slopes,) = torch.autograd.grad(-odds.sigmoid().log().sum(), odds)
    torch.testing.assert_close(peers.trak_weight(similarity), -slopes.mean(0))


@pytest.mark.parametrize("make", [heads, towers])
def test_a_batch_of_one_has_no_trak_score(make):
    scope, data = make()
    batch = tuple(part[:1] for part in data)
    assert peers.frozen_gradients(scope, scope.start, batch, peers.trak_output).isfinite().all()
    assert peers.trak_weight(scope.similarity(scope.start, batch)).item() == 0


# a matrix, a vector, a number, a matrix without gradient, and a second matrix
SHAPES = [torch.Size(shape) for shape in [(3, 4), (5,), (), (2, 2), (2, 3)]]
STARTS = [0, 12, 17, 18, 22]
SLICES = [peers.TensorSlice(start, start + shape.numel(), shape) for start, shape in zip(STARTS, SHAPES, strict=True)]


def toy(pairs=40):
    draw = draws()
    gradients = draw(pairs, 28) @ draw(28, 28)
    gradients[:, 18:22] = 0
    return gradients, draw(28)


def dense_scores(gradients, target, inverses):
    """``(1/N) target . inverse g_i`` for a block-diagonal inverse, ``{number of the slice: inverse}``."""
    total = torch.zeros(len(gradients), dtype=torch.float64)
    for number, inverse in inverses.items():
        start, stop, _ = SLICES[number]
        total += gradients[:, start:stop] @ inverse @ target[start:stop]
    return total.numpy() / len(gradients)


def blocks(gradients, numbers):
    return {number: gradients[:, SLICES[number].start : SLICES[number].stop] for number in numbers}


def test_tracin_is_a_dot_product():
    gradients, target = toy()
    np.testing.assert_allclose(peers.tracin(gradients, target), [(row @ target).item() / 40 for row in gradients])


def test_logra_of_full_rank_is_a_damped_solve_a_matrix():
    gradients, target = toy()
    inverses = {}
    for number, block in blocks(gradients, (0, 4)).items():
        covariance = block.T @ block / 40
        inverses[number] = torch.linalg.inv(covariance + 0.1 * torch.linalg.eigvalsh(covariance).mean() * eye(block))
    np.testing.assert_allclose(peers.hook_logra(gradients, target, SLICES), dense_scores(gradients, target, inverses))


def test_logra_of_low_rank_is_a_solve_among_the_principal_directions():
    gradients, target = toy()
    inverses = {}
    for number, block in blocks(gradients, (0, 4)).items():
        basis = torch.kron(*(vectors[:, -2:].contiguous() for vectors in kronecker_basis(block, SHAPES[number])))
        projected = block @ basis
        covariance = projected.T @ projected / 40
        damped = covariance + 0.1 * torch.linalg.eigvalsh(covariance).mean() * eye(projected)
        inverses[number] = basis @ torch.linalg.inv(damped) @ basis.T
    got = peers.hook_logra(gradients, target, SLICES, rank=2)
    np.testing.assert_allclose(got, dense_scores(gradients, target, inverses))


def test_datainf_is_the_mean_of_the_inverses():
    gradients, target = toy()
    inverses = {}
    for number, block in blocks(gradients, (0, 1, 2, 4)).items():
        damping = 0.1 * sum(row @ row for row in block) / 40 / block.shape[1]
        inverses[number] = sum(torch.linalg.inv(torch.outer(row, row) + damping * eye(block)) for row in block) / 40
    np.testing.assert_allclose(peers.datainf(gradients, target, SLICES), dense_scores(gradients, target, inverses))


def test_ekfac_is_diagonal_in_the_kronecker_basis():
    gradients, target = toy()
    inverses = {}
    for number, block in blocks(gradients, (0, 1, 2, 4)).items():
        matrix = number in (0, 4)
        basis = torch.kron(*kronecker_basis(block, SHAPES[number])) if matrix else eye(block)
        moments = (basis.T @ (block.T @ block / 40) @ basis).diagonal()
        inverses[number] = basis @ torch.diag(1 / (moments + 0.1 * moments.mean())) @ basis.T
    np.testing.assert_allclose(peers.ekfac(gradients, target, SLICES), dense_scores(gradients, target, inverses))


def eye(block):
    return torch.eye(block.shape[1], dtype=torch.float64)


def kronecker_basis(block, shape):
    matrices = [row.view(shape) for row in block]
    return (
        torch.linalg.eigh(sum(g @ g.T for g in matrices)).eigenvectors,
        torch.linalg.eigh(sum(g.T @ g for g in matrices)).eigenvectors,
    )


def test_trak_with_all_directions_is_a_newton_step():
    draw = draws()
    gradients, weights, target = draw(40, 8), draw(40).abs(), draw(8)
    expected = -weights * (gradients @ torch.linalg.inv(gradients.T @ gradients) @ target)
    for projection in (torch.linalg.qr(draw(8, 8)).Q, peers.gaussian_projection(8, 8)):
        got = peers.trak(gradients, weights, target, projection)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_the_gaussian_projection_keeps_dot_products_and_its_seed():
    projection = peers.gaussian_projection(30, 4000)
    torch.testing.assert_close(projection @ projection.T, torch.eye(30), rtol=0, atol=0.1)
    assert torch.equal(projection, peers.gaussian_projection(30, 4000))
    assert not torch.equal(projection, peers.gaussian_projection(30, 4000, seed=1))


@pytest.fixture
def problem(model):
    scope, data = model
    batches = Batches(*data, PARTITION)
    gradient, _ = ContrastiveLoss(scope, batches, 9).gradient_and_value(scope.start)
    return peers.Problem(scope, scope.start, batches, 9, gradient)


def test_stacked_gradients_are_in_the_order_of_the_pairs(problem):
    scope, theta = problem.scope, problem.theta
    kinds = {
        "hook": peers.hook_gradients,
        "anchor": peers.anchor_gradients,
        "frozen": lambda *of: peers.frozen_gradients(*of, SoftmaxLoss().pair_losses),
    }
    for kind, function in kinds.items():
        for rows, batch in zip(PARTITION, problem.batches, strict=True):
            torch.testing.assert_close(getattr(problem, kind)[rows], function(scope, theta, batch).float())
    assert problem.hook is problem.hook  # computed once


@pytest.mark.parametrize("name", peers.PEERS)
def test_pairs_are_valuable_to_their_own_loss(problem, name):
    scores = peers.PEERS[name](problem)
    assert scores.shape == (9,)
    assert scores.dtype == np.float64
    assert scores.sum() > 0


def test_the_methods_differ(problem):
    scores = np.stack([peer(problem) for peer in peers.PEERS.values()])
    assert np.abs(np.corrcoef(scores) - np.eye(len(scores))).max() < 0.9999
