"""Hold the whole parameters of an FSDP2 model for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from am_fsdp._torch_compat import is_unsharded, stay_gathered_after_forward, unit_parameters, writes


@contextmanager
def unshard_fsdp2_model(model: nn.Module) -> Generator[None, None, None]:
    """Gather all parameters once, for several forwards without gradients such as log-probabilities.

    On leaving, also by an exception, the modules that were sharded before are sharded again; those that were not
    stay as they were.

    Edits of the gathered parameters would be lost, so they are refused when the context is left.

    Collectives (data axis): one all-gather per FSDP module that is sharded, in the order of `model.modules()`.

    Raises:
        ValueError: a parameter was written inside.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule) and not is_unsharded(m)]
    gathered: list[tuple[str, torch.Tensor, int]] = []
    undo = [stay_gathered_after_forward(module) for module in sharded]
    try:
        for module in sharded:
            with torch.inference_mode(False):  # what it allocates inside would be of no use to a training step
                module.unshard()
            gathered += [
                (name, whole, writes(whole)) for name, _, whole in unit_parameters(module) if whole is not None
            ]
        yield
    finally:
        for module, as_before in zip(sharded, undo, strict=True):
            as_before()
            module.reshard()
    edited = [name for name, whole, before in gathered if writes(whole) != before]
    if edited:
        raise ValueError(
            f"{edited[0]} was written while it was gathered, which its shards do not know; edit the shards"
        )
