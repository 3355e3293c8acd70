"""The model to plan for, without weights: its parts by kind, and a twin that has one layer of each kind."""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from am_moe.expert_parallel.experts import describe_experts
from am_pipeline.cut.anatomy import candidate_stacks
from training.model import add_adapters
from verifying.model import built_by_function


@dataclass(frozen=True)
class Planned:
    """A model on the meta device, and what its layers are.

    Attributes:
        model: every weight on meta.
        config: of its decoder; None for a model without.
        stack: the name of the `ModuleList` of layers.
        kinds: the kind of each layer; layers of a kind have the same modules, shapes and attention.
    """

    name: str
    model: nn.Module
    config: Any
    stack: str
    kinds: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def counts(self) -> Counter[int]:
        return Counter(self.kinds)

    def twin(self) -> nn.Module:
        """The model with the first layer of each kind alone, still on meta."""
        kept = [self.kinds.index(kind) for kind in sorted(set(self.kinds))]
        layers = self.model.get_submodule(self.stack)
        chosen = nn.ModuleList(copy.deepcopy(layers[index]) for index in kept)
        twin = copy.deepcopy(self.model, {id(layers): chosen})
        for config in {id(m.config): m.config for m in twin.modules() if hasattr(m, "config")}.values():
            _keep_layers(config, len(layers), kept)
        for index, layer in enumerate(chosen):
            for module in layer.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index
        return twin


def plan_for(name: str, lora: int = 0) -> Planned:
    """A type of transformers, a folder with a `config.json`, or `module:function`, on meta.

    Raises:
        ValueError: nothing of that name, or a model without a stack of layers.
    """
    with torch.device("meta"):
        is_function = ":" in name and not os.path.isdir(name)
        model = built_by_function(name) if is_function else _from_config(name)
        if lora:
            add_adapters(model, lora, seed=0)
    return of_model(model, name)


def of_model(model: nn.Module, name: str) -> Planned:
    """The same of a model that is on meta."""
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    decoder = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    stack = candidate_stacks(model)[0]
    if describe_experts(model) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")  # which a trace can follow: who goes where does not matter to it
    return Planned(name, model, decoder, stack, _kinds(model.get_submodule(stack), decoder))


def _from_config(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name) if os.path.isdir(name) else AutoConfig.for_model(name)
    except ValueError:
        raise ValueError(
            f"{name!r} is neither a folder with a config.json, nor a model type of transformers, nor module:function"
        ) from None
    for key, value in vars(config).items():
        if isinstance(value, float) and ("drop" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)


def _kinds(layers: nn.Module, config: Any) -> tuple[int, ...]:
    listed = [v for v in vars(config).values() if isinstance(v, list) and len(v) == len(layers)] if config else []
    known: dict[Any, int] = {}
    kinds = []
    for index, layer in enumerate(layers):
        shapes = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
        signature = (type(layer), shapes, tuple(type(m) for m in layer.modules()), str([v[index] for v in listed]))
        kinds.append(known.setdefault(signature, len(known)))
    return tuple(kinds)


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def _keep_layers(config: Any, count: int, kept: list[int]) -> None:
    for name, value in list(vars(config).items()):
        if name in _COUNTS and value == count:
            setattr(config, name, len(kept))
        elif isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])
        elif hasattr(value, "to_dict"):
            _keep_layers(value, count, kept)
