"""Find the modules that hold stacked experts, by structure."""

from __future__ import annotations

import inspect

from torch import nn

_ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model that holds stacked experts, with its full name, in order.

    Such a module has parameters whose first dim counts the experts (`gate_up_proj` of shape `(E, 2I, D)` and the like),
    an attribute `num_experts`, and a forward that takes `hidden_states (T, D)`, `top_k_index (T, K)` and
    `top_k_weights (T, K)` and returns the weighted sum `(T, D)`. An id of `num_experts` means no expert. This is how
    transformers 5 writes its experts; a module of your own that does the same is found too.
    """
    return [(name, module) for name, module in model.named_modules() if _holds_experts(module)]


def _holds_experts(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    if not any(p.dim() == 3 for p in parameters) or not isinstance(getattr(module, "num_experts", None), int):
        return False
    if len({p.shape[0] for p in parameters}) != 1:
        return False
    return list(inspect.signature(type(module).forward).parameters)[1:4] == _ARGUMENTS
