"""The private parts of torch this package stands on; `tests/test_torch_compat.py` fails when they move."""

from __future__ import annotations

from typing import Any

from torch import nn


def hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts in which a module keeps its hooks, for a copy that shall have none."""
    return [value for name, value in vars(module).items() if name.startswith("_") and "hooks" in name and value]


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before and after a module's forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
