# A copy of packages/am-fsdp/src/am_fsdp/layout/late_parameters.py, made by `nox -s copies`: edit that one.
"""Parameters that a model gets after its layout, such as peft's adapters: each rank would train its own.

peft also takes the sizes of an adapter from the weight that it finds, which is a shard then.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from am_moe.data_parallel.evaluation import outside_graphs


def refuse_late_parameters(model: nn.Module) -> None:
    """Refuse, at the first forward, parameters that a model was given after its layout.

    Args:
        model: after the last `fully_shard`.

    Raises:
        ValueError: from the first forward, on every rank: names one of them, and what to do.
    """
    known = {name for name, _ in model.named_parameters()}

    @outside_graphs
    def check(_module: nn.Module, _arguments: Any) -> None:
        late = [n for n, p in model.named_parameters() if n not in known and not isinstance(p, DTensor)]
        if late:
            raise ValueError(
                f"{late[0]} and {len(late) - 1} more parameters were added to {type(model).__name__} after it was laid "
                "out, so that each rank would train its own; add adapters first, as with peft.get_peft_model(model, "
                "config), lay out what get_base_model() returns, and give a trainer that model without a peft_config"
            )
        handle.remove()

    handle = model.register_forward_pre_hook(check, prepend=True)
