"""Which models context parallelism is right for, by their structure; everything else is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


def registry_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose forward looks its attention function up in transformers' registry, with their names."""
    return [(name, module) for name, module in model.named_modules() if _uses_registry(module)]


def engine_attention(model: nn.Module) -> list[tuple[str, Any]]:
    """Transformer Engine's attention modules, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == "DotProductAttention" and hasattr(module, "set_context_parallel_group")
    ]


def configs_of(model: nn.Module) -> list[Any]:
    """Every config that a module of the model holds, once."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def check_supported(model: nn.Module) -> None:
    """Refuse a model in which tokens meet other than in attention that the registry serves.

    Raises:
        ValueError: names the model, the module or setting, and why.
    """
    name = type(model).__name__
    attention = [module for _, module in registry_attention(model)]
    if not attention:
        raise ValueError(
            f"{name} has no attention that looks its function up in transformers' registry (ALL_ATTENTION_FUNCTIONS), "
            "and none of Transformer Engine; context parallelism has nothing to take the place of"
        )
    reason = _by_config(model) or _by_modules(model, attention) or _by_layers(model, attention) or _by_signature(model)
    if reason:
        raise ValueError(f"context parallelism is not right for {name}: {reason}")


def _by_config(model: nn.Module) -> str | None:
    for config in configs_of(model):
        if getattr(config, "is_encoder_decoder", False):
            return "it has an encoder and a decoder, and its cross-attention would need another sequence's keys"
        other = sorted(set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES))
        if other:
            return f"its config has layers of type {', '.join(other)}; only {', '.join(_LAYER_TYPES)} are known"
    return None


def _by_modules(model: nn.Module, attention: list[nn.Module]) -> str | None:
    served = {id(inner) for module in attention for inner in module.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return f"{name} is a convolution ({kind}), which mixes neighbouring tokens"
        if isinstance(module, nn.RNNBase):
            return f"{name} ({kind}) is recurrent"
        if "crossattention" in kind.lower():
            return f"{name} ({kind}) attends to another sequence"
        own = "attention" in kind.lower() and id(module) not in served
        if own and any(True for _ in module.parameters()) and not any(_uses_registry(m) for m in module.modules()):
            return f"{name} ({kind}) computes attention by itself, without the registry"
        if hasattr(module, "create_position_ids_from_input_ids"):
            return f"{name} ({kind}) counts positions from its padding token's id, not from 0"
    return None


def _by_layers(model: nn.Module, attention: list[nn.Module]) -> str | None:
    serving = {id(module) for module in attention}
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        has = [any(id(inner) in serving for inner in layer.modules()) for layer in stack]
        if any(has) and not all(has):
            index = has.index(False)
            layer = stack[index]
            # A layer without parameters of another kind than attention may have been left empty by a pipeline.
            if any(True for _ in layer.parameters()):
                return f"{name}.{index} ({type(layer).__name__}) has no attention that the registry serves"
    return None


def _by_signature(model: nn.Module) -> str | None:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so a part of a sequence cannot be told where it lies"
    return None


def _uses_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
