"""Hold the whole parameters of an FSDP2 model for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from am_fsdp._torch_compat import is_unsharded


@contextmanager
def unshard_fsdp2_model(model: nn.Module) -> Generator[None, None, None]:
    """Gather all parameters once, for several forwards without gradients such as log-probabilities.

    On leaving, also by an exception, the modules that were sharded before are sharded again; those that were not
    stay as they were.

    Collectives (data axis): one all-gather per FSDP module that is sharded, in the order of `model.modules()`.
    """
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule) and not is_unsharded(m)]
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()
