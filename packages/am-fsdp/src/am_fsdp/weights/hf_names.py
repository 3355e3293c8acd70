"""What a tensor of a model is called, and made of, in a folder of Hugging Face weights, and the other way round.

For a transformers model both directions are transformers' own conversions (renamed keys, experts stacked and fused,
packed projections), run on `Lazy` tensors. Any other module's names are the folder's.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from am_fsdp.weights.lazy import Lazy


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a folder holds of a model: parameters, themselves, and persistent buffers; tied ones under each name."""
    return {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def of_transformers(model: nn.Module) -> bool:
    """Whether a class of transformers is among the model's; nothing is imported to find out."""
    return any(c.__module__.startswith("transformers.modeling_utils") for c in type(model).__mro__)


def model_tensors(model: nn.Module, names: Mapping[str, torch.Tensor], folder: dict[str, Lazy]) -> dict[str, Lazy]:
    """The folder's tensors under the model's names; keys that the model has no tensor for stay, where they matter.

    Raises:
        ValueError: a conversion does not fit what the folder holds.
    """
    if not of_transformers(model):
        return dict(folder)
    with own_classes(model):
        found = _converted(model, names, folder)
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    buffers = [name for name, _ in model.named_buffers()]
    for leftover in ("rotary_emb.inv_freq", "position_ids"):  # older folders hold buffers that are computed today
        if any(name.endswith(leftover) for name in buffers):
            ignored.append(rf"(^|\.){re.escape(leftover)}$")
    return {n: t for n, t in found.items() if n in names or not any(re.search(p, n) for p in ignored)}


def _converted(model: nn.Module, names: Mapping[str, torch.Tensor], folder: dict[str, Lazy]) -> dict[str, Lazy]:
    loading = importlib.import_module("transformers.core_model_loading")
    conversions = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    found: dict[str, Lazy] = {}
    collected: dict[str, Any] = {}
    for key in sorted(folder, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = key, None
        if pattern is None or name not in names:
            found[name] = folder[key]
        else:
            converter = collected.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, folder[key])
    for name, converter in collected.items():
        sources = sorted(converter.layer_targets[name])
        try:
            made = converter.convert(name, model=model, config=model.config)
        except Exception as error:  # whatever an operation does with tensors that do not fit it
            raise ValueError(f"{name} cannot be made of {some(sources)}: {error}") from error
        found |= {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
    return found


def folder_tensors(model: nn.Module, tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """The model's tensors under the folder's keys, as `save_pretrained` writes them.

    Raises:
        ValueError: a conversion has no way back.
    """
    if not of_transformers(model):
        return tensors
    loading = importlib.import_module("transformers.core_model_loading")
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    with own_classes(model):
        try:
            reverted = loading.revert_weight_conversion(model, {n: t for n, t in tensors.items() if n not in ignored})
        except Exception as error:
            raise ValueError(f"{type(model).__name__}: transformers cannot revert its conversions: {error}") from error
    return {key: tensor for key, tensor in reverted.items() if isinstance(tensor, Lazy)}


def tied_sources(model: nn.Module) -> dict[str, str]:
    """Which names transformers ties to which, where the config says so; the values are what a folder holds."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def own_classes(model: nn.Module) -> Generator[None, None, None]:
    """Give modules back the class that `fully_shard` derived theirs from, which transformers knows them by."""
    changed = [(m, type(m)) for m in model.modules() if isinstance(m, FSDPModule)]
    try:
        for module, kind in changed:
            module.__class__ = next(c for c in kind.__mro__ if not issubclass(c, FSDPModule))
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, for an error."""
    listed = sorted(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
