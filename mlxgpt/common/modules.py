"""Modules of MLX over other parameters than their own."""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.nn as nn

Module = TypeVar("Module", bound=nn.Module)


def with_parameters(module: Module, parameters: Any) -> Module:
    """A module that computes what `module` computes, with other parameters, and shares everything else with it.

    parameters is a tree as module.parameters() is, or a part of one; its leaves may be anything that the module's
    operations take. `module` itself does not change: torch.func.functional_call does the same for PyTorch.
    """
    other = type(module).__new__(type(module))
    other.__dict__.update(module.__dict__)
    dict.update(other, module)
    for name, value in parameters.items():
        dict.__setitem__(other, name, _replaced(module[name], value))
    return other


def _replaced(old: Any, new: Any) -> Any:
    if isinstance(old, nn.Module):
        return with_parameters(old, new)
    if isinstance(old, list):
        return [*map(_replaced, old, new), *old[len(new) :]]
    return new
