"""Canonical heads against scikit-learn's definition: directions of greatest correlation."""

import numpy as np
import torch

from fiftyone_ecif.misalignment.canonical import canonical_heads


def features(pairs=500, seed=0):
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(pairs, 2))
    sides = [
        np.concatenate([shared * (2, 1), generator.normal(size=(pairs, width))], axis=1)
        @ generator.normal(size=(width + 2, width + 2))
        + 0.3 * generator.normal(size=(pairs, width + 2))
        for width in (3, 5)
    ]
    return [torch.from_numpy(side) for side in sides]


def test_without_a_ridge_directions_have_the_canonical_correlations():
    images, texts = features()
    heads = canonical_heads(images, texts, torch.ones(len(images)), 0.0)
    left, right = ((side - heads.means[n]) @ heads.heads[n] for n, side in enumerate((images, texts)))
    whole = np.corrcoef(left.T.numpy(), right.T.numpy())
    size = left.shape[1]
    found = np.diag(whole[:size, size:])
    # the singular values of the product of orthonormal bases of both sides are the correlations (Bjoerck and Golub)
    bases = [np.linalg.qr((side - side.mean(0)).numpy())[0] for side in (images, texts)]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(whole[:size, :size], np.eye(size), atol=1e-6)
    assert expected[0] > 0.8


def test_directions_are_weighted_by_the_root_of_their_correlation():
    images, texts = features()
    heads = canonical_heads(images, texts, torch.ones(len(images)), 0.0)
    left = (images - heads.means[0]) @ heads.heads[0]
    right = (texts - heads.means[1]) @ heads.heads[1]
    correlation = np.diag(np.corrcoef(left.T.numpy(), right.T.numpy())[:5, 5:])
    np.testing.assert_allclose(left.square().mean(0).numpy(), correlation, atol=1e-6)


def test_pairs_that_belong_together_are_near_and_others_are_not():
    images, texts = features()
    held_images, held_texts = features(seed=0)
    u, v = canonical_heads(images[:400], texts[:400], torch.ones(400), 0.3).embed(held_images[400:], held_texts[400:])
    similarity = u @ v.T
    assert similarity.diagonal().mean() > 0.5
    assert abs(similarity.mean()) < 0.1
    torch.testing.assert_close(u.norm(dim=1), torch.ones(100))


def test_fewer_pairs_than_features_and_constant_features_are_no_error():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(10, 30, generator=generator), torch.randn(10, 20, generator=generator)
    images[:, 3] = 1.0
    heads = canonical_heads(images, texts, torch.ones(10), 0.3)
    assert all(side.isfinite().all() for side in heads.embed(images, texts))


def test_a_weight_counts_as_so_many_equal_pairs():
    images, texts = features()
    weights = torch.arange(len(images)) % 4
    rows = torch.arange(len(images)).repeat_interleave(weights)
    repeated = canonical_heads(images[rows], texts[rows], torch.ones(len(rows)), 0.3)
    weighed = canonical_heads(images, texts, weights, 0.3)
    for found, expected in zip(weighed.embed(images, texts), repeated.embed(images, texts), strict=True):
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-5, atol=1e-6)
