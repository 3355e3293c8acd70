"""Activation checkpointing per layer, without wrappers: names in `state_dict` and `named_parameters` stay."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from am_fsdp.units import layer_stacks


def checkpoint_layers(model: nn.Module) -> None:
    """Recompute every layer of every stack in backward instead of keeping its activations.

    The forward of each layer instance is replaced, inside the hooks that FSDP and tensor-parallel styles put on the
    layer. A key-value cache would be filled twice, so `model.config.use_cache` is set to False.
    """
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", False):
        config.use_cache = False
    for stack in layer_stacks(model):
        for layer in stack:
            if any(True for _ in layer.parameters()):
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
