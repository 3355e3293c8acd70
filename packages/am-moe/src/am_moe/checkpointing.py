"""Recompute a block's activations in backward instead of keeping them, with the routing it had."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from am_moe.experts import describe_experts
from am_moe.units import layers

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def apply_ac(
    model: nn.Module,
    ignore_router: bool = False,
    hidden_size: int | None = None,
    num_experts: int | None = None,
) -> nn.Module:
    """Recompute each block in backward, in place and without wrappers: names in `state_dict` stay.

    Of a block only its input is kept, and with `ignore_router` what its routers computed and what the dispatchers
    received: recomputation then takes the same experts whatever happens in between, and nothing travels again. Apply it
    after `apply_ep` and before `apply_fsdp`. A key-value cache would be filled twice, so `model.config.use_cache` is
    set to False.

    Args:
        model: blocks in `ModuleList`s, prediction heads (`mtp.layers`) included.
        ignore_router: keep routing decisions and dispatched rows.
        hidden_size: D, by which the router's product `(T, D) @ (D, E)` is known; that of `model.config` if None.
        num_experts: E; that of the model's experts, or of its config, if None.

    Returns:
        The model.

    Collectives: none here. Recomputation repeats those of the forward, on every rank alike; with `ignore_router` none
        of the expert axis.

    Raises:
        ValueError: no blocks; `ignore_router` without sizes to be had; layers that share keys and values through a
            cache, which recomputation would not find as it was.
    """
    config = _text_config(model)
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model).__name__} shares keys and values between layers (num_kv_shared_layers="
            f"{config.num_kv_shared_layers}), which recomputation would not find again; leave it out"
        )
    how: dict[str, Any] = {"use_reentrant": False}
    if ignore_router:
        router = _router_shape(model, config, hidden_size, num_experts)
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, router))
    blocks = layers(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no ModuleList of blocks to recompute")
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, **how)
    return model


def _policy(router: tuple[int, int], _context: Any, function: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what the dispatchers received, and products with a matrix of the router's shape.

    What `topk` returns is not kept, since many routers go on in place on it; of the same products it chooses the same.
    """
    if isinstance(function, torch._ops.OpOverload):
        name = function._schema.name
        if name.startswith("am_moe::"):
            return CheckpointPolicy.MUST_SAVE
        if name in ("aten::mm", "aten::addmm") and tuple(args[-1].shape) == router:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _router_shape(model: nn.Module, config: Any, hidden: int | None, experts: int | None) -> tuple[int, int]:
    hidden = hidden or getattr(config, "hidden_size", None)
    if experts is None:
        found = describe_experts(model)
        named = (getattr(config, name, None) for name in _COUNTS)
        experts = found[0].num_experts if found else next((n for n in named if isinstance(n, int)), None)
    return _positive(model, "hidden_size", hidden), _positive(model, "num_experts", experts)


def _positive(model: nn.Module, name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"ignore_router=True needs {name}, got {value!r}; {type(model).__name__} does not say it")
    return value


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
