"""Adapters that peft put into a model, told from the tensors of the base model; nothing of peft is imported.

model.layers.0.q_proj.base_layer.weight      the base model's model.layers.0.q_proj.weight
model.layers.0.q_proj.lora_A.default.weight  the adapter's model.layers.0.q_proj.lora_A.weight
lm_head.original_module.weight               the base model's lm_head.weight
lm_head.modules_to_save.default.weight       the adapter's lm_head.weight
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_fsdp._torch_compat import local_box
from am_fsdp.weights.lazy import Lazy

_PREFIX = "base_model.model."  # of peft's wrapper, in an adapter's file
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def base_model(model: nn.Module) -> Any:
    """The model inside peft's wrapper, or the model itself."""
    wrapped = hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None))
    return model.get_base_model() if wrapped else model  # type: ignore[operator]


@dataclass(frozen=True)
class Adapters:
    """What is whose in a model with adapters.

    Attributes:
        base: the base model's name of each of its tensors, by the name in the model.
        trained: the name in an adapter's file, and the adapter's, of each tensor that peft added.
        layers: the adapted layers, by name.
    """

    base: dict[str, str]
    trained: dict[str, tuple[str, str]]
    layers: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, names: list[str]) -> Adapters:
        """Read the structure of a model (that of `base_model`), whose tensors have these names."""
        layers = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "base_layer", None), nn.Module)}
        kept = {
            name for name, m in model.named_modules() if isinstance(getattr(m, "modules_to_save", None), nn.ModuleDict)
        }
        base, trained = {}, {}
        for name in names:
            plain, adapter, own = [], "", []
            parts = name.split(".")
            for depth, part in enumerate(parts):
                owner = ".".join(parts[:depth])
                if owner in layers and part != "base_layer":
                    adapter, own = (parts[depth + 1] if depth + 1 < len(parts) else ""), [part, *parts[depth + 2 :]]
                    break
                if owner in kept and part == "modules_to_save":
                    adapter, own = parts[depth + 1], parts[depth + 2 :]
                    break
                if not ((owner in layers and part == "base_layer") or (owner in kept and part == "original_module")):
                    plain.append(part)
            if adapter or own:
                trained[name] = (".".join([*plain, *own]), adapter)
            else:
                base[name] = ".".join(plain)
        return cls(base, trained, layers)

    def __bool__(self) -> bool:
        return bool(self.trained)


def adapter_of(model: Any) -> str:
    """The name of the one adapter that is active.

    Raises:
        ValueError: none or several are, or it is disabled.
    """
    layers = Adapters.of(model, []).layers.values()
    active = sorted({name for layer in layers for name in _listed(getattr(layer, "active_adapters", ()))})
    if len(active) != 1:
        raise ValueError(f"one adapter must be active to be saved, {active or 'none'} are; use set_adapter")
    if any(getattr(layer, "disable_adapters", False) for layer in layers):
        raise ValueError(f"adapter {active[0]!r} is disabled; enable it before saving")
    return active[0]


def adapter_tensors(adapters: Adapters, tensors: dict[str, Lazy], adapter: str) -> dict[str, Lazy]:
    """An adapter's tensors under the keys of its file.

    Raises:
        ValueError: it holds something else than LoRA matrices and whole modules.
    """
    found = {}
    for name, (own, owner) in adapters.trained.items():
        if owner == adapter and name in tensors:
            if (
                ".modules_to_save." not in f".{name}."
                and own.split(".")[-1] not in _LORA
                and own.split(".")[-2] not in _LORA
            ):
                raise ValueError(f"{name} is no LoRA matrix; save it with peft's own save_pretrained in one process")
            found[_PREFIX + own] = tensors[name]
    return found


def merged_tensors(model: Any, adapters: Adapters, tensors: dict[str, Lazy], adapter: str) -> dict[str, Lazy]:
    """The base model's tensors with an adapter in them, as peft's `merge_and_unload` computes them.

    Raises:
        ValueError: an adapted layer is no plain LoRA of a linear layer or an embedding.
    """
    result = {plain: tensors[name] for name, plain in adapters.base.items() if name in tensors}
    result |= {
        own: tensors[name]
        for name, (own, owner) in adapters.trained.items()
        if owner == adapter and name in tensors and ".modules_to_save." in f".{name}."
    }
    for name, layer in adapters.layers.items():
        kind = "lora_embedding_" if f"{name}.lora_embedding_A.{adapter}" in tensors else "lora_"
        tail = "" if kind == "lora_embedding_" else ".weight"
        pair = [f"{name}.{kind}{side}.{adapter}{tail}" for side in "AB"]
        own = [n for n, (_, owner) in adapters.trained.items() if owner == adapter and n.startswith(f"{name}.")]
        if not own:
            continue
        weight = adapters.base.get(f"{name}.base_layer.weight")
        variant = adapter in getattr(layer, "lora_variant", {}) or getattr(layer, "use_dora", {}).get(adapter, False)
        if sorted(own) != sorted(pair) or variant or weight is None or result[weight].dim() != 2:
            raise ValueError(
                f"{name} is no plain LoRA of a linear layer or an embedding; save adapters='adapter' instead"
            )
        first, second = (tensors[side] for side in pair)
        dtype = second.dtype
        if dtype in (torch.float16, torch.bfloat16):  # as peft does on the CPU
            first, second = first.float(), second.float()
        delta = second @ first
        if kind == "lora_embedding_" or getattr(layer, "fan_in_fan_out", False):
            delta = delta.transpose(0, 1)
        delta = (delta * layer.scaling[adapter]).to(dtype)
        result[weight] = (result[weight] + delta).to(result[weight].dtype)  # type: ignore[assignment]
    return result


def initialise_adapters(adapters: Adapters, values: dict[str, torch.Tensor]) -> None:
    """Give LoRA matrices that came from meta the values that peft begins with: one of each pair is zero.

    The random one is the same in every layout where `torch.initial_seed()` is.
    """
    for name, value in values.items():
        own = adapters.trained[name][0].split(".")
        side = next(part for part in own if part in _LORA)
        local = value.to_local() if isinstance(value, DTensor) else value
        if side in ("lora_B", "lora_embedding_A"):
            local.zero_()
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (torch.initial_seed() & 0xFFFFFFFF))
        whole = torch.empty(value.shape, dtype=torch.float32)
        if side == "lora_A":
            bound = 1 / math.sqrt(value.shape[1])
            whole.uniform_(-bound, bound, generator=generator)
        else:
            whole.normal_(generator=generator)
        box = local_box(value) if isinstance(value, DTensor) else [(0, size) for size in value.shape]
        local.copy_(whole[tuple(slice(*ends) for ends in box)])


def check_initialised(model: Any, adapters: Adapters, names: list[str]) -> None:
    """Refuse adapters on meta that `initialise_adapters` has no rule for.

    Raises:
        ValueError: names one.
    """
    configs = getattr(model, "peft_config", {})
    for name in names:
        own, adapter = adapters.trained[name]
        plain = getattr(configs.get(adapter), "init_lora_weights", True) is True
        if not plain or not any(part in _LORA for part in own.split(".")):
            raise ValueError(
                f"{name} is an adapter's tensor on meta, and only LoRA matrices with peft's default "
                "init_lora_weights=True can be initialised; materialise it before loading the base weights"
            )


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
