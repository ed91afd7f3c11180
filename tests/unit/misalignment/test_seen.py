"""Whether training steps agree, pair by pair, and whether that tells fitted weights from others."""

import pytest
import torch

from fiftyone_ecif.influence.heads import HeadScope
from fiftyone_ecif.misalignment import seen
from fiftyone_ecif.misalignment.seen import agreement_of_steps, was_fitted

PAIRS, WIDTH, DIMENSIONS = 200, 12, 6


def pairs(seed):
    """Images and captions of the same world, some captions wrong."""
    world = torch.Generator().manual_seed(99)
    to_image, to_text = (torch.randn(4, WIDTH, generator=world, dtype=torch.double) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(PAIRS, 4, generator=generator, dtype=torch.double)
    said = meaning.clone()
    said[: PAIRS // 5] = meaning[torch.randperm(PAIRS // 5, generator=generator)]
    noise = [torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.double) for _ in range(2)]
    return meaning @ to_image + noise[0], said @ to_text + noise[1]


def new_heads():
    generator = torch.Generator().manual_seed(7)
    heads = [torch.randn(WIDTH, DIMENSIONS, generator=generator, dtype=torch.double) for _ in range(2)]
    return HeadScope(*heads, 5.0)


def fitted(images, texts):
    """Heads trained as people do: random batches, Adam, a rate that falls to nothing."""
    scope, steps = new_heads(), 400
    theta = scope.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        rows = torch.randperm(PAIRS, generator=generator)[:100]
        optimizer.zero_grad()
        scope.loss.pair_losses(scope.similarity(theta, (images[rows], texts[rows]))).sum().backward()
        optimizer.step()
        schedule.step()
    return scope, theta.detach()


@pytest.mark.parametrize("batch", [64, 4])
def test_it_is_the_sum_of_the_products_of_gradients_by_pair(batch, monkeypatch):
    monkeypatch.setattr(seen, "_BATCH", batch)
    scope, (images, texts) = new_heads(), pairs(0)
    images, texts = images[:9], texts[:9]

    def by_pair(theta, copies):
        """The loss where each pair has heads of its own."""
        heads = [scope.split(theta + copy) for copy in copies]
        sides = [torch.stack([row @ head[n] for row, head in zip(features, heads, strict=True)])
                 for n, features in enumerate((images, texts))]  # fmt: skip
        u, v = (torch.nn.functional.normalize(side, dim=1) for side in sides)
        batches = [slice(start, start + batch) for start in range(0, 9, batch)]
        return sum(scope.loss.pair_losses(scope.logits(theta, u[rows] @ v[rows].T)).sum() for rows in batches)

    copies = [torch.zeros_like(scope.start).requires_grad_() for _ in range(9)]
    gradients = torch.stack(torch.autograd.grad(by_pair(scope.start, copies), copies))
    products = gradients @ gradients.T
    products.fill_diagonal_(0)
    expected = products.sum() / (2 * products.square().sum()).sqrt()
    assert agreement_of_steps(scope, scope.start, images, texts) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weights_that_were_fitted_to_the_pairs_are_told_from_those_fitted_to_others(seed):
    asked = pairs(seed)
    assert was_fitted(agreement_of_steps(*fitted(*asked), *asked))
    assert not was_fitted(agreement_of_steps(*fitted(*pairs(seed + 10)), *asked))
    scope = new_heads()
    assert not was_fitted(agreement_of_steps(scope, scope.start, *asked))
