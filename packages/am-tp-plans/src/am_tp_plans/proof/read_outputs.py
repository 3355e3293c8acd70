"""What lies between a model's layers, or inside them, may be one rank's part, and then nobody is to read it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.stacks import stacks_of
from am_tp_plans.styles.basic import is_open_colwise, shards_sequence

_HIDDEN_STATES = (
    "with sequence parallelism the hidden states between layers are one rank's part of the sequence; use a plan "
    "without sequence parallelism to read them"
)
_ATTENTIONS = (
    "with a plan that shards attention each rank has the weights of its own heads only; read them from a model whose "
    "attention is whole"
)


def refuse_parts(model: nn.Module, plan: dict[str, ParallelStyle]) -> None:
    """Let a model refuse to return hidden states or attention weights that would be one rank's part.

    Every module with such layers in it is told, the model and the decoder in it, since each may be called by itself. A
    model that reads the hidden states of its tower's layers is refused so in the rehearsal.

    Raises, at a forward, on every rank alike and before anything runs:
        ValueError: `output_hidden_states` or `output_attentions` is asked for, by the call or by the config.
    """
    parts = {
        "output_hidden_states": (_HIDDEN_STATES, {name for name, s in plan.items() if shards_sequence(s)}),
        "output_attentions": (_ATTENTIONS, {n for n, s in plan.items() if "att" in n and is_open_colwise(s)}),
    }
    stacks = [f"{stack}." for stack in stacks_of(model)]
    for owner, module in model.named_modules():
        if not hasattr(module, "config") or not any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
            continue
        within = f"{owner}." if owner else ""
        # What is sharded before a stack is so in every stack.
        refused = {
            option: why
            for option, (why, names) in parts.items()
            if any(n.startswith(within) or not n.startswith(tuple(stacks)) for n in names)
        }
        if refused:
            module.register_forward_pre_hook(partial(_refuse, refused), with_kwargs=True)


def _refuse(refused: dict[str, str], module: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    for option, why in refused.items():
        asked = kwargs.get(option)
        if asked is None:
            asked = getattr(getattr(module, "config", None), option, False)
        if asked:
            raise ValueError(f"{option}=True of {type(module).__name__}: {why}")
