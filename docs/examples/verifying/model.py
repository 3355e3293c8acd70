"""The model to verify: a type of transformers, a Hugging Face folder, or what a function of the user's builds."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from verifying.shrink import shrink


@dataclass(frozen=True)
class Subject:
    """What is verified, before it is built.

    Attributes:
        name: a model type, a folder with a `config.json`, or `module:function`; `path/file.py:function` too.
        shrink: whether few layers and small widths are enough.
        layers: how many a shrunk model has.
        ranks_of_heads: tensor ranks that its heads divide between.
    """

    name: str
    shrink: bool
    layers: int
    ranks_of_heads: int

    @property
    def is_function(self) -> bool:
        return ":" in self.name and not os.path.isdir(self.name)

    def build(self, attention: str, dtype: torch.dtype, seed: int) -> nn.Module:
        """The model with the same weights on every rank, in training mode, with nothing random in its forward.

        Raises:
            ValueError: nothing of that name, or transformers has not this attention for it.
        """
        torch.manual_seed(seed)
        model = built_by_function(self.name) if self.is_function else self._from_transformers(attention)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.to(dtype).train()

    def _from_transformers(self, attention: str) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        is_folder = os.path.isdir(self.name)
        try:
            config = AutoConfig.from_pretrained(self.name) if is_folder else AutoConfig.for_model(self.name)
        except ValueError:
            raise ValueError(
                f"{self.name!r} is neither a folder with a config.json, nor a model type of transformers, nor "
                "module:function"
            ) from None
        if self.shrink:
            config = shrink(config, self.layers, self.ranks_of_heads)
        for name, value in vars(config).items():
            if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
                setattr(config, name, 0.0)
        config.use_cache = False
        weights = is_folder and not self.shrink and any(pathlib.Path(self.name).glob("*.safetensors"))
        settings: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
        if weights:
            return AutoModelForCausalLM.from_pretrained(self.name, config=config, **settings)
        model = AutoModelForCausalLM.from_config(config, **settings)
        with torch.no_grad():  # norms and biases too: what is one or zero hides errors
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model


def vocabulary(model: nn.Module) -> int:
    """How many ids there are: of the config, or of the first embedding."""
    config = getattr(model, "config", None)
    if config is not None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if isinstance(getattr(text, "vocab_size", None), int):
            return text.vocab_size
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ValueError(f"{type(model).__name__} has no embedding, so it is not known which ids it takes")


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward takes an input of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def built_by_function(name: str) -> nn.Module:
    where, _, function = name.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(pathlib.Path(where).stem, where)
        if spec is None or spec.loader is None or not os.path.isfile(where):
            raise ValueError(f"there is no file {where!r}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where!r} cannot be imported from {os.getcwd()}: {error}") from None
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f"{where} has no function {function!r}")
    model = build()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returns a {type(model).__name__}, not an nn.Module")
    return model
