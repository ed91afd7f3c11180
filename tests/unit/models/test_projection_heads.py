"""The linear map that a tower ends in is found wherever it is, and what it takes is what enters it."""

import open_clip
import pytest
import torch

from fiftyone_ecif.bench.models.small import small_model
from fiftyone_ecif.models.projection_heads import find_head
from fiftyone_ecif.models.towers import Tower

HEADS = {
    "ViT-B-32": ("visual.proj", "text_projection"),
    "RN50": ("visual.attnpool.c_proj.weight", "text_projection"),
    "ViT-B-16-SigLIP": ("visual.trunk.attn_pool.mlp.fc2.weight", "text.text_projection.weight"),
    "ViT-SO400M-16-SigLIP-i18n-256": ("visual.trunk.attn_pool.mlp.fc2.weight", None),
    "EVA02-B-16": ("visual.trunk.head.weight", "text.text_projection"),
    "MobileCLIP-S1": ("visual.trunk.head.fc.weight", "text.text_projection"),
    "PE-Core-T-16-384": ("visual.trunk.head.weight", "text.text_projection"),
    "convnext_large_d": ("visual.head.mlp.fc2.weight", "text_projection"),
    "coca_ViT-B-32": ("visual.proj", "text.text_projection"),
    "nllb-clip-base-siglip": ("visual.trunk.attn_pool.mlp.fc2.weight", "text.proj.weight"),
    "xlm-roberta-base-ViT-B-32": ("visual.proj", "text.proj.2.weight"),
}
OF_TRANSFORMERS = ("nllb-clip-base-siglip", "xlm-roberta-base-ViT-B-32")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")

    def run(name):
        if name in OF_TRANSFORMERS:
            pytest.importorskip("transformers")
        small, weights = small_model(name, folder)
        return open_clip.create_model(small, pretrained=str(weights)).eval().requires_grad_(False)

    return run


def inputs_of(model, tower, seed):
    draw = torch.Generator().manual_seed(seed)
    if tower == "image":
        size = model.visual.image_size
        return torch.rand(3, 3, *(size if isinstance(size, tuple) else (size, size)), generator=draw)
    return torch.randint(3, 20, (3, 12), generator=draw)


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_found_and_makes_the_embedding(name, make):
    model = make(name)
    for tower, weight in zip(("image", "text"), HEADS[name], strict=True):
        run = Tower(model, tower)
        with torch.no_grad():
            head = find_head(run, inputs_of(model, tower, seed=0))
            assert head.weight == weight
            assert head.has_offset == ("attn_pool.mlp" in str(weight))
            inputs = inputs_of(model, tower, seed=1)
            features, matrix = head.features(run, inputs).double(), head.matrix(model)
            assert features.shape[1] == len(matrix) + head.has_offset * matrix.shape[1]
            # other weights, put into the model in place, give what the features say
            changed = matrix + 0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2))
            for where in (matrix, changed):
                for parameter, value in head.tensors(where).items():
                    model.get_parameter(parameter).copy_(value)
                encode = model.encode_image if tower == "image" else model.encode_text
                found = features[:, : len(matrix)] @ where
                if head.has_offset:
                    found = found + features[:, len(matrix) :]
                if weight or where is matrix:
                    torch.testing.assert_close(found.float(), encode(inputs, normalize=False), rtol=1e-4, atol=1e-4)
