"""Target losses against plain loops, their gradients against autograd."""

import math

import pytest
import torch

from fiftyone_ecif.errors import EcifError
from fiftyone_ecif.influence.heads import FeatureBatches, HeadScope
from fiftyone_ecif.influence.losses import SigmoidLoss, SoftmaxLoss
from fiftyone_ecif.influence.objective import random_partition
from fiftyone_ecif.influence.target_losses import Classes, find_target_loss
from fiftyone_ecif.influence.targets import ZeroShotTarget, fill_prompts

CLASSES, TEMPLATES, BIAS = 4, 2, -1.5


def own_loss(images, captions, logits):
    """A user's: something of both embeddings and of the logits."""
    return (images - 2 * captions).abs().sum(1) + logits.diagonal() ** 2 / (1 + logits.square().sum(0))


def own_loss_of(u, v, logits, n):
    return sum(abs(a - 2 * b) for a, b in zip(u[n], v[n], strict=True)) + logits[n][n] ** 2 / (
        1 + sum(row[n] ** 2 for row in logits)
    )


LOSSES = ["contrastive", "retrieval_margin", own_loss, "zero_shot"]
IDS = ["contrastive", "retrieval_margin", "callable", "zero_shot"]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=IDS)
each_objective = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
each_size = pytest.mark.parametrize(("pairs", "batch_size"), [(9, 9), (10, 4), (7, 2), (5, 1), (1, 1)])


def make_target(loss, kind="softmax", pairs=10, batch_size=4, scale=4.0, with_scale=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    objective, bias = (SoftmaxLoss(), 0.0) if kind == "softmax" else (SigmoidLoss(), BIAS)
    scope = HeadScope(draw(6, 3), draw(5, 3), scale, bias, objective, with_scale)
    batches = FeatureBatches(draw(pairs, 6), draw(pairs, 5), random_partition(pairs, batch_size, seed))
    labels, prompts = torch.arange(pairs) * 3 % CLASSES, draw(CLASSES * TEMPLATES, 5)
    return find_target_loss(loss).make(scope, batches, Classes(labels, prompts, TEMPLATES))


def varied(scope, seed=3):
    noise = torch.randn(len(scope.start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scope.start + 0.1 * noise


def unit(row, head):
    """One embedding, with plain numbers."""
    out = [sum(row[i] * head[i][j] for i in range(len(row))) for j in range(len(head[0]))]
    length = math.sqrt(sum(x * x for x in out))
    return [x / length for x in out]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def log_sum_exp(values):
    return math.log(sum(math.exp(x) for x in values))


def plain(target, theta, loss, kind):
    """The losses and mistakes, in the order of the rows, from loops over Python numbers."""
    scope, batches = target.scope, target.batches
    image_head, text_head = (head.tolist() for head in scope.split(theta))
    scale, bias = float(scope.scale(theta)), BIAS if kind == "sigmoid" else 0.0
    count = len(batches.images)
    images = [unit(row, image_head) for row in batches.images.tolist()]
    captions = [unit(row, text_head) for row in batches.texts.tolist()]
    losses, mistakes = [None] * count, [None] * count
    if loss == "zero_shot":
        prompts = [unit(row, text_head) for row in target.prompts.tolist()]
        classes = []
        for c in range(CLASSES):
            mean = [sum(parts) / TEMPLATES for parts in zip(*prompts[c * TEMPLATES : (c + 1) * TEMPLATES], strict=True)]
            length = math.sqrt(dot(mean, mean))
            classes.append([x / length for x in mean])
        for n in range(count):
            logits, label = [scale * dot(images[n], c) + bias for c in classes], int(target.labels[n])
            losses[n] = log_sum_exp(logits) - logits[label]
            mistakes[n] = max(range(CLASSES), key=logits.__getitem__) != label
        return losses, mistakes
    for batch in batches.partition:
        rows = batch.tolist()
        u, v = [images[r] for r in rows], [captions[r] for r in rows]
        s = [[scale * dot(a, b) + bias for b in v] for a in u]
        for n, row in enumerate(rows):
            across = [s[n][k] for k in range(len(rows)) if k != n]
            down = [s[k][n] for k in range(len(rows)) if k != n]
            mistakes[row] = bool(across) and max(max(across), max(down)) > s[n][n]
            if loss == "retrieval_margin":
                losses[row] = (max(across) + max(down)) / 2 - s[n][n] if across else 0.0
            elif loss is own_loss:
                losses[row] = own_loss_of(u, v, s, n)
            elif kind == "softmax":
                losses[row] = log_sum_exp([*across, s[n][n]]) + log_sum_exp([*down, s[n][n]]) - 2 * s[n][n]
            else:
                softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
                losses[row] = softplus(-s[n][n]) + sum(map(softplus, across + down)) / 2
    return losses, mistakes


@each_loss
@each_objective
@each_size
def test_losses_and_mistakes_equal_plain_loops_in_the_order_of_the_rows(loss, kind, pairs, batch_size):
    target = make_target(loss, kind, pairs, batch_size)
    theta = varied(target.scope)
    losses, mistakes = plain(target, theta, loss, kind)
    torch.testing.assert_close(target.losses(theta), torch.tensor(losses, dtype=torch.float64))
    assert target.mistakes(theta).tolist() == mistakes
    assert target.loss(theta).item() == pytest.approx(sum(losses) / pairs)
    assert target.pairs == pairs


def matches_by_loops(target, theta, loss):
    """The strongest wrong and right match of each pair by direction, as ``(row or class, cosine)``."""
    image_head, text_head = (head.tolist() for head in target.scope.split(theta))
    images = [unit(row, image_head) for row in target.batches.images.tolist()]
    twins = None if target.twins is None else target.twins.tolist()
    found = [None] * len(images)
    if loss == "zero_shot":
        for rows, batch in zip(target.batches.partition, target.batches, strict=True):
            classes = target.class_similarity(theta, batch).tolist()  # which the losses compare with loops
            for row, cosines in zip(rows.tolist(), classes, strict=True):
                found[row] = [strongest(dict(enumerate(cosines)), {int(target.labels[row])})]
        return found
    captions = [unit(row, text_head) for row in target.batches.texts.tolist()]
    for batch in target.batches.partition:
        rows = batch.tolist()
        for row in rows:
            right = {k for k in rows if k == row or (twins and any(map(int.__eq__, twins[k], twins[row])))}
            across = {k: dot(images[row], captions[k]) for k in rows}
            down = {k: dot(images[k], captions[row]) for k in rows}
            found[row] = [strongest(across, right), strongest(down, right)]
    return found


def strongest(cosines, right):
    """Of the wrong ones and of the right ones; None where there is no wrong one."""
    wrong = set(cosines) - right
    return max(wrong, key=cosines.get) if wrong else None, max(right, key=cosines.get), cosines


@each_loss
@pytest.mark.parametrize("with_twins", [False, True])
@pytest.mark.parametrize(("pairs", "batch_size"), [(10, 10), (10, 4), (10, 2), (10, 1)])
def test_what_a_pair_is_mistaken_for_equals_plain_loops(loss, with_twins, pairs, batch_size):
    target = make_target(loss, "softmax", pairs, batch_size)
    target.twins = TWINS if with_twins and loss != "zero_shot" else None
    theta = varied(target.scope)
    expected, mistakes = matches_by_loops(target, theta, loss), target.mistakes(theta)
    for rows, batch in zip(target.batches.partition, target.batches, strict=True):
        found = target.batch_matches(theta, rows, batch)
        assert torch.equal(found.mistakes, mistakes[rows])
        for place, row in enumerate(rows.tolist()):
            assert found.wrong.shape[1] == len(expected[row]) == (1 if loss == "zero_shot" else 2)
            for side, (wrong, right, cosines) in enumerate(expected[row]):
                assert found.right[place, side] == right
                assert found.right_similarity[place, side].item() == pytest.approx(cosines[right])
                if wrong is None:
                    assert found.wrong_similarity[place, side] == -math.inf
                else:
                    assert found.wrong[place, side] == wrong
                    assert found.wrong_similarity[place, side].item() == pytest.approx(cosines[wrong])


def test_these_pairs_are_not_all_right_or_all_wrong():
    """Or the comparison above would not see an order that is mixed up."""
    for loss in LOSSES:
        target = make_target(loss)
        assert not torch.equal(torch.cat(list(target.batches.partition)), torch.arange(10))
        assert 0 < target.mistakes(varied(target.scope)).sum() < 10
        assert len(set(target.losses(target.scope.start).tolist())) == 10


@each_loss
@each_objective
@pytest.mark.parametrize(
    ("pairs", "batch_size", "scale", "with_scale"),
    [(9, 9, 1.0, False), (10, 4, 4.0, True), (7, 2, 30.0, True), (5, 1, 4.0, False)],
)
def test_the_gradient_is_that_of_the_mean(loss, kind, pairs, batch_size, scale, with_scale):
    target = make_target(loss, kind, pairs, batch_size, scale, with_scale)
    theta = varied(target.scope)
    gradient, value = target.gradient_and_value(theta)
    point, total = theta.clone().requires_grad_(), 0.0
    for rows, batch in zip(target.batches.partition, target.batches, strict=True):
        u, v = (part / part.norm(dim=1, keepdim=True) for part in target.scope.embed(point, batch))
        s = target.scope.scale(point) * u @ v.T + (BIAS if kind == "sigmoid" else 0.0)
        if loss == "zero_shot":
            prompts = target.prompts @ target.scope.split(point)[1]
            prompts = prompts / prompts.norm(dim=1, keepdim=True)
            classes = torch.stack([prompts[2 * c] + prompts[2 * c + 1] for c in range(CLASSES)])
            s = target.scope.scale(point) * u @ (classes / classes.norm(dim=1, keepdim=True)).T
            total = total - s.log_softmax(1)[torch.arange(len(rows)), target.labels[rows]].sum()
        elif loss == "retrieval_margin":
            for n in range(len(rows)):
                others = [k for k in range(len(rows)) if k != n]
                total = total + ((s[n, others].max() + s[others, n].max()) / 2 - s[n, n] if others else 0 * s[n, n])
        elif loss is own_loss:
            total = total + own_loss(u, v, s).sum()
        else:
            total = total + target.scope.loss.pair_losses(s).sum()
    (expected,) = torch.autograd.grad(total / pairs, point)
    torch.testing.assert_close(value, (total / pairs).detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


def test_the_partition_does_not_change_losses_of_pairs_that_do_not_compete():
    one, other = (make_target("zero_shot", batch_size=size) for size in (10, 3))
    theta = varied(one.scope)
    torch.testing.assert_close(one.losses(theta), other.losses(theta))
    torch.testing.assert_close(one.gradient_and_value(theta)[0], other.gradient_and_value(theta)[0])


def test_predictions_are_the_best_class():
    target = make_target("zero_shot")
    theta = varied(target.scope)
    wrong = target.predictions(theta) != target.labels
    assert wrong.tolist() == target.mistakes(theta).tolist()
    target.labels = target.predictions(theta)
    assert not target.mistakes(theta).any()


def test_class_embeddings_are_averages_of_unit_embeddings():
    """A template whose embedding is long has no more weight than another."""
    target = make_target("zero_shot")
    theta = varied(target.scope)
    before = target.losses(theta)
    target.prompts = target.prompts * torch.tensor([1.0, 50.0] * CLASSES, dtype=torch.float64)[:, None]
    torch.testing.assert_close(target.losses(theta), before)
    single = ZeroShotTarget(target.scope, target.batches, target.labels, target.prompts[::2])
    assert not torch.allclose(single.losses(theta), before)


#: Five images with two captions each, of which two are the same text.
TWINS = torch.tensor([[n // 2, n if n != 7 else 0] for n in range(10)])


def by_the_protocol(target, theta):
    """Margins and mistakes where all captions of an image are right, from loops over Python numbers."""
    scope, batches = target.scope, target.batches
    image_head, text_head = (head.tolist() for head in scope.split(theta))
    images = [unit(row, image_head) for row in batches.images.tolist()]
    captions = [unit(row, text_head) for row in batches.texts.tolist()]
    margins, mistakes = [None] * len(images), [None] * len(images)
    for batch in batches.partition:
        rows = batch.tolist()
        for row in rows:
            sides = [{k: float(scope.scale(theta)) * dot(images[row], captions[k]) for k in rows}]
            sides.append({k: float(scope.scale(theta)) * dot(images[k], captions[row]) for k in rows})
            right = {k for k in rows if TWINS[k][0] == TWINS[row][0] or TWINS[k][1] == TWINS[row][1]}
            found = [max([s[k] for k in rows if k not in right], default=0) - max(s[k] for k in right) for s in sides]
            if right == set(rows):
                found = [0.0, 0.0]
            margins[row] = sum(found) / 2
            mistakes[row] = max(sides[0], key=sides[0].get) not in right or max(sides[1], key=sides[1].get) not in right
    return margins, mistakes


@pytest.mark.parametrize("batch_size", [10, 4, 2])
def test_captions_of_one_image_are_not_held_against_each_other(batch_size):
    target = make_target("retrieval_margin", "softmax", 10, batch_size)
    theta = varied(target.scope)
    apart, before = target.mistakes(theta), target.losses(theta)
    target.twins = TWINS
    margins, mistakes = by_the_protocol(target, theta)
    torch.testing.assert_close(target.losses(theta), torch.tensor(margins, dtype=torch.float64))
    assert target.mistakes(theta).tolist() == mistakes
    assert (target.mistakes(theta) <= apart).all()
    assert batch_size == 2 or not torch.equal(target.losses(theta), before)
    gradient, value = target.gradient_and_value(theta)
    assert gradient.isfinite().all()
    step = 1e-6 * torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change = target.loss(theta + step) - target.loss(theta - step)
    torch.testing.assert_close(2 * gradient.dot(step), change, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(value, target.losses(theta).mean())


def test_a_pair_alone_has_nothing_to_be_mistaken_for():
    target = make_target("retrieval_margin", pairs=3, batch_size=1)
    gradient, value = target.gradient_and_value(target.scope.start)
    assert value == 0
    assert gradient.abs().max() == 0
    assert not target.mistakes(target.scope.start).any()


@pytest.mark.parametrize(
    ("wrong", "shape"),
    [
        (lambda images, captions, logits: logits.mean(), r"\(\)"),
        (lambda images, captions, logits: logits, r"\(4, 4\)"),
        (lambda images, captions, logits: logits.diagonal()[:, None], r"\(4, 1\)"),
        (lambda images, captions, logits: logits.diagonal()[1:], r"\(3,\)"),
    ],
)
def test_a_callable_must_return_one_loss_a_pair(wrong, shape):
    target = make_target(wrong, pairs=4)
    for call in (target.losses, target.gradient_and_value):
        with pytest.raises(EcifError, match=rf"returned shape {shape} for 4 pairs. Return one loss a pair"):
            call(target.scope.start)


def test_prompts_of_one_class_are_next_to_each_other():
    assert fill_prompts(["cat", "dog"], ["a {}.", "{} {}"]) == ["a cat.", "cat cat", "a dog.", "dog dog"]
