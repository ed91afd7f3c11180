"""Weights of CLIP and SigLIP as Hugging Face's transformers names them, under the names that open_clip gives them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from fiftyone_ecif.errors import EcifError

_CLIP = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # so it is spelt
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.final_layer_norm\.", "ln_final."),
)
_SIGLIP = (
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"vision_model\.head\.", "visual.trunk.attn_pool."),
    (r"text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "text.positional_embedding"),
    (r"text_model\.encoder\.layers\.", "text.transformer.resblocks."),
    (r"text_model\.final_layer_norm\.", "text.ln_final."),
    (r"text_model\.head\.", "text.text_projection."),
)
_RESBLOCK = (
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.self_attn\.in_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
_TIMM_BLOCK = (
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.in_proj\.", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)


def from_transformers(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Weights under open_clip's names; those that are not named as in transformers are given back as they are.

    Args:
        state: of a ``CLIPModel`` or ``SiglipModel``, or of anything else.
        file: where they are from.

    Raises:
        EcifError: if they are of another model of transformers that looks at images and texts
    """
    if not any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return state
    siglip = "vision_model.head.probe" in state
    if not siglip and "visual_projection.weight" not in state:
        raise EcifError(
            f"The checkpoint {file} is of transformers, and neither a CLIPModel nor a SiglipModel. Load another one"
        )
    names = _SIGLIP if siglip else _CLIP
    found: dict[str, Tensor] = {}
    for name, value in _joined(state).items():
        if name.endswith(".position_ids"):
            continue
        blocks = _TIMM_BLOCK if siglip and name.startswith("vision_model.") else _RESBLOCK
        for pattern, other in (*names, *blocks) if ".layers." in name else names:
            name = re.sub(pattern, other, name)
        found[name] = value
    if siglip:
        found["visual.trunk.pos_embed"] = found["visual.trunk.pos_embed"][None]
        for kind in ("weight", "bias"):
            query, key, value = found.pop(f"visual.trunk.attn_pool.attention.in_proj_{kind}").chunk(3)
            found[f"visual.trunk.attn_pool.q.{kind}"] = query
            found[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat([key, value])
        return found
    found["visual.proj"] = found.pop("visual_projection.weight").T
    found["text_projection"] = found.pop("text_projection.weight").T
    return found


def uses_quick_gelu(folder: Path) -> bool | None:
    """Whether a CLIP model of transformers in a folder computes with QuickGELU; None if there is no such model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") != "clip":
            return None
        return bool((config.get("text_config") or {}).get("hidden_act", "quick_gelu") == "quick_gelu")
    except (OSError, ValueError, AttributeError):
        return None


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The projections to queries, keys and values of each attention as one."""
    found = {name: value for name, value in state.items() if not re.search(r"\.self_attn\.[qkv]_proj\.", name)}
    for name in state:
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            found[name.replace(".q_proj.", ".in_proj.")] = torch.cat(parts)
    return found
