"""A module with some of its parts replaced, which leaves the module itself as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def replaced(module: Module, parts: Mapping[str, Any]) -> Module:
    """A copy of a module that has other parts and shares all the rest, so that it takes no memory.

    Args:
        module: any.
        parts: parameters, buffers, modules or attributes that it has, by their dotted names.
    """
    view = copy.copy(module)
    kinds = [dict(getattr(view, kind)) for kind in ("_parameters", "_buffers", "_modules")]
    view._parameters, view._buffers, view._modules = kinds
    below: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        first, _, rest = name.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = part
        else:
            next((kind for kind in kinds if first in kind), view.__dict__)[first] = part
    for first, inner in below.items():
        view._modules[first] = replaced(module.get_submodule(first), inner)
    return view
