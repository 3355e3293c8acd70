"""Packed (quantised) weights, as bitsandbytes makes them: which of them FSDP2 can shard, and which it would destroy.

A 4-bit linear holds its weight as a column `(n, 1)` of numbers of any dtype, into which the bits are packed, and what
the bits mean in the module's `quant_state`. FSDP2 shards the column like any other weight, if nothing casts it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


def packed_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of linears, by name, whose shape is not `(out_features, in_features)`."""
    return {
        f"{name}.weight".lstrip("."): weight
        for name, module, weight in _linears(model)
        if tuple(weight.shape) != (module.out_features, module.in_features)
    }


def check_packed(model: nn.Module, mp_policy: MixedPrecisionPolicy) -> None:
    """Refuse packed weights that would not be what they are when FSDP2 has gathered them; changes nothing.

    Raises:
        ValueError: a policy would cast packed bits as if they were numbers; or see `check_whole`.
    """
    check_whole(model)
    for name, weight in packed_weights(model).items():
        if weight.is_floating_point() and mp_policy.param_dtype not in (None, weight.dtype):
            raise ValueError(
                f"{name} is packed into {weight.dtype}, which mixed precision would cast to {mp_policy.param_dtype}; "
                f"quantise with bnb_4bit_quant_storage={mp_policy.param_dtype}, or compute in no other dtype"
            )


def check_whole(model: nn.Module) -> None:
    """Refuse linears whose weight is more than numbers: what it holds besides is lost with the parameter's class.

    Raises:
        ValueError: a weight of a class of its own, and no `quant_state` in the module to make it anew from.
    """
    for name, module, weight in _linears(model):
        kind = type(weight)
        if nn.Parameter in kind.__mro__[1:] and getattr(module, "quant_state", None) is None:
            raise ValueError(
                f"{name}.weight is a {kind.__name__}, which holds more than numbers: a plain parameter takes its "
                "place, the rest is lost. Of quantised linears, those of bitsandbytes' 4 bits can be sharded, after "
                "from_pretrained(folder, quantization_config=...) has read and packed them"
            )


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear, nn.Parameter]]:
    """With the weight that is registered: one that is computed, as under a parametrisation, would be computed here."""
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    held = ((name, module, dict(module.named_parameters(recurse=False)).get("weight")) for name, module in linears)
    return [(name, module, weight) for name, module, weight in held if weight is not None]
