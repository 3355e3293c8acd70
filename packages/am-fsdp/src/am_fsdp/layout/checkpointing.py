"""Activation checkpointing per layer, without wrappers: names in `state_dict` and `named_parameters` stay."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from am_fsdp.layout.units import layer_stacks, turn_off_caches

Mode = Literal["full", "selective", "mlp"]
MODES = get_args(Mode)
_MLP = re.compile(r"(^|_)(mlp|ffn?|feed_forward|moe|experts)($|_|\d)")
_SAVED = re.compile(r"^(aten::(mm|addmm|bmm|baddbmm|_scaled_dot_product\w*|_grouped_mm)|_c10d_functional::\w+)$")


def checkpoint_layers(model: nn.Module, mode: bool | int | Mode = "full") -> None:
    """Recompute activations in backward instead of keeping them.

    The forward of each layer instance is replaced, inside the hooks that FSDP and tensor-parallel styles put on the
    layer. A key-value cache would be filled twice, so `use_cache` is set to False in the config of the model and of
    every part of it.

    Args:
        model: layers in `ModuleList`s; changed in place.
        mode: "full" (or True) keeps a layer's input alone; an int n does so for every n-th layer, beginning with the
            first; "selective" keeps what matrix products, attention and functional collectives returned and recomputes
            the rest; "mlp" recomputes each layer's MLP or experts alone. False does nothing.

    Raises:
        ValueError: another mode, no layer or no MLP to recompute, or layers that share keys and values through a cache,
            which a recomputation would not find as it was.
    """
    modules = recomputed_modules(model, mode)
    if not modules:
        return
    turn_off_caches(model)
    how: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, **how)


def recomputed_modules(model: nn.Module, mode: bool | int | Mode) -> list[Any]:
    """The modules that `checkpoint_layers` would recompute; none without recomputation, changes nothing.

    Raises:
        ValueError: as `checkpoint_layers`.
    """
    if mode is False:
        return []
    _check(model, mode)
    modules = list(_recomputed(model, mode))
    if not modules:
        raise ValueError(f"{type(model).__name__} has nothing to recompute with activation checkpointing {mode!r}")
    return modules


def _check(model: nn.Module, mode: Any) -> None:
    number = isinstance(mode, int) and not isinstance(mode, bool)
    if not (mode is True or mode in MODES or (number and mode > 0)):
        raise ValueError(f"activation checkpointing must be a bool, a positive int or one of {MODES}, got {mode!r}")
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model).__name__} shares keys and values between layers (num_kv_shared_layers="
            f"{text.num_kv_shared_layers}), which recomputation would not find again; turn activation checkpointing off"
        )


def _recomputed(model: nn.Module, mode: bool | int | Mode) -> Iterator[Any]:
    for stack in layer_stacks(model):
        layers = [layer for layer in stack if any(True for _ in layer.parameters())]
        if mode == "mlp":
            for layer in layers:
                yield from (child for name, child in layer.named_children() if _MLP.search(name))
        else:
            step = mode if isinstance(mode, int) and not isinstance(mode, bool) else 1
            yield from layers[::step]


def _policy(_context: Any, function: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if isinstance(function, torch._ops.OpOverload) and _SAVED.match(function._schema.name):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
