"""What a model refuses before and after its parameters are sharded, because a layout would lose or split it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_fsdp._torch_compat import has_gradient_hooks
from am_fsdp.layout.evaluation import outside_graphs

_OF_MODULES = frozenset(vars(nn.Module()))  # the attributes in which every module keeps things


def refuse_after_layout(model: Any) -> None:
    """Refuse `save_pretrained`, and parameters that come after the layout, such as peft's adapters.

    Of those each rank would train its own; peft also takes their sizes from the weight that it finds, a shard then.

    Args:
        model: after the last `fully_shard`.

    Raises, later and on every rank:
        ValueError: from forwards up to the first that trains: names one of the parameters, and what to do.
        RuntimeError: from `save_pretrained`, with what to call instead.
    """
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(_refuse_save_pretrained, type(model).__name__)
    known = {name: _owner(model, name) for name, _ in model.named_parameters()}

    @outside_graphs
    def check(_module: nn.Module, _arguments: Any) -> None:
        plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        late = [name for name in plain if known.get(name) is not _owner(model, name)]  # a new head has the old names
        if late:
            raise ValueError(
                f"{late[0]} and {len(late) - 1} more parameters were added to {type(model).__name__} after it was laid "
                "out, so that each rank would train its own; add adapters and heads first, as with "
                "peft.get_peft_model(model, config), lay out what get_base_model() returns, and give a trainer that "
                "model without a peft_config"
            )
        if torch.is_grad_enabled():  # an evaluation may come before a trainer adds what it trains
            handle.remove()

    handle = model.register_forward_pre_hook(check, prepend=True)


def refuse_before_layout(model: nn.Module) -> None:
    """Refuse what a layout would leave behind with the parameters that it takes the place of; changes nothing.

    Raises:
        ValueError: names a parameter with a hook on its gradient, or one that a module holds beside its registered one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) and has_gradient_hooks(parameter):  # those of a tensor plan come back
            raise ValueError(
                f"{name} has a hook on its gradient, which would stay with the parameter that the sharded one takes "
                "the place of; register_post_accumulate_grad_hook after the layout runs on the reduced gradient"
            )
    for where, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict) and key not in _OF_MODULES:
                value = value.values()
            elif not isinstance(value, (list, tuple)):
                continue
            for held in value:
                if isinstance(held, nn.Parameter) and id(held) in names:
                    raise ValueError(
                        f"{where or type(module).__name__}.{key} holds {names[id(held)]} where nobody finds it, and "
                        "would keep the whole one; look it up in forward, or register it by nn.ParameterList"
                    )


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def _refuse_save_pretrained(name: str, *_: Any, **__: Any) -> None:
    """transformers would write this rank's shards, or wait for ranks that do not come."""
    raise RuntimeError(
        f"save_pretrained cannot write {name}, whose parameters are sharded over ranks; call "
        "am_fsdp.save_hf_weights(model, folder) on every rank (pip install am-fsdp[hf])"
    )
