"""What towers give on a GPU is what they give on the CPU: features, and scores and gradients of scopes inside them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fiftyone_ecif.bench.models.small import small_model
from fiftyone_ecif.bench.speed.passes import network, problem
from fiftyone_ecif.influence.direct import batch_influence
from fiftyone_ecif.influence.losses import SoftmaxLoss
from fiftyone_ecif.influence.projections import BasisProjection
from fiftyone_ecif.influence.scope_choice import parse_scope
from fiftyone_ecif.models.open_clip_encoder import OpenClipEncoder
from fiftyone_ecif.models.tower_scope import TowerScope, scope_parameters

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
PAIRS, WIDTH, LAYERS = 24, 64, 3


def test_features_of_several_batches(tmp_path):
    model, weights = small_model("ViT-B-32", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 40, 50, 3), dtype=np.uint8)
    paths = [str(tmp_path / f"{number}.jpg") for number in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    captions = [f"number {number}" for number in range(len(paths))]
    found = []
    for device in ("cuda", "cpu"):
        encoder = OpenClipEncoder(model, str(weights), device)
        indices, images, _ = zip(*encoder.image_features(paths, 4, 2), strict=True)
        assert [index for batch in indices for index in batch] == list(range(len(paths)))
        found.append((torch.cat(images), torch.cat(list(encoder.text_features(captions, 4)))))
    for features, expected in zip(*found, strict=True):
        torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("text", ["lora:2", "blocks:1", "."])
def test_scores_and_stored_gradients(text):
    start, batch, _ = problem(text, PAIRS, WIDTH, LAYERS)
    draw = torch.Generator().manual_seed(0)
    size = len(start.start)
    theta = start.start + 0.02 * torch.randn(size, generator=draw)
    vector, basis = torch.randn(size, generator=draw), torch.linalg.qr(torch.randn(size, 8, generator=draw)).Q
    choice, found = parse_scope(text), []
    for device in ("cuda", "cpu"):
        model = network(WIDTH, LAYERS).to(device)
        names = scope_parameters(model, choice, tuple(side[:2].to(device) for side in batch))
        scope = TowerScope(model, names, SoftmaxLoss(), choice.rank)
        entered = tuple(
            scope.enter(tower, side.to(device)) for tower, side in zip(("image", "text"), batch, strict=True)
        )
        at = theta.to(device)
        scores = batch_influence(scope, at, entered, vector.to(device), PAIRS)
        stored = BasisProjection(scope, basis.to(device)).removal_gradients(at, entered, tolerance=0.0)
        found.append([each.cpu() for each in (*scores, *stored)])
    for values, expected in zip(*found, strict=True):
        assert (values - expected).norm() < 1e-4 * expected.norm()
