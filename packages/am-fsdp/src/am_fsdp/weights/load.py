"""A Hugging Face folder read into a model that is laid out over ranks: of each tensor, this rank's part."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from am_fsdp._torch_compat import has_gradient_hooks, local_box
from am_fsdp.layout.buffers import compute_buffers, planned_buffers
from am_fsdp.layout.packed import check_whole
from am_fsdp.weights.adapters import Adapters, base_model, check_initialised, initialise_adapters
from am_fsdp.weights.hf_folder import HFFolder
from am_fsdp.weights.hf_names import model_tensors, named_tensors, some, tied_sources
from am_fsdp.weights.lazy import Box, Lazy


@torch.no_grad()
def load_hf_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
) -> nn.Module:
    """Read a Hugging Face safetensors folder into a model that is laid out over ranks, each rank its own shards.

    Parameters and buffers on the meta device get memory for this rank's shard alone; others are filled in place. Of
    each tensor of the folder a rank reads the slices that it keeps, straight into the shard, converting them to the
    dtype that the model has. A transformers model's keys are converted as `from_pretrained` does, experts of
    one key each stacked and fused. Tied weights stay one parameter; buffers that no folder holds (rotary frequencies)
    are computed by transformers' own initialisation. Parameters keep being the objects they were, so an optimizer that
    holds them need not know. The model takes the folder's generation config.

    A model with peft's adapters (wrapped or not) reads its base weights from the folder of its base model. Adapters on
    meta begin as peft's do: one LoRA matrix of each pair zero, the other random by `torch.initial_seed()`, the same in
    every layout. Those that are real are left alone.

    Args:
        model: laid out on any mesh (`fsdp2_strategy_parallelize`, tensor or expert parallelism), or not at all; on
            meta, or real, or in part either. It may be a pipeline part, with `strict=False`.
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names; every rank sees it.
        device: where parameters on meta go; the device of their mesh if None, or the CPU for those without one.
            `CPUOffloadPolicy` wants "cpu".
        strict: False passes over keys that the model has no tensor for. What the model needs is always demanded.

    Returns:
        The model.

    Collectives: none.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no such folder or one without safetensors; a tensor of the model that the folder lacks, has in
            another shape, or in a dtype whose values the model's cannot hold (integers for floats or for narrower
            integers, 8-bit floats, complex for real, 1e300 for float16); a key that the model lacks; tied weights that
            differ in the folder; a buffer on meta that nothing says how to compute, or an adapter that nothing says how
            to initialise. Every rank that holds the same model and sees the same folder raises the same, before any
            memory is allocated.
    """
    check_whole(base_model(model))
    source = HFFolder(folder)
    whole, model = model, base_model(model)
    held = named_tensors(model)
    adapters = Adapters.of(model, list(held))
    tensors = {plain: held[name] for name, plain in adapters.base.items()}
    found = model_tensors(model, tensors, source.tensors)
    names = _sources(model, tensors, found)
    _check_fit(model, tensors, found, names, source, strict)
    boxes = {name: _box(tensor, name) for name, tensor in tensors.items()}
    added = _added_on_meta(model, adapters, held, tensors, boxes, names)
    buffers = planned_buffers(model, {*held, *tensors})
    home = torch.device(device) if device is not None else _home(held)
    for name, tensor in {id(t): (n, t) for n, t in tensors.items()}.values():
        target = _with_memory(model, tensor, home) if tensor.is_meta else tensor
        found[names[name]].read_into(target.to_local() if isinstance(target, DTensor) else target, boxes[name])
        source.release()
    initialise_adapters(adapters, {name: _with_memory(model, held[name], home) for name in added})
    compute_buffers(model, buffers, home)
    _read_generation_config(model, folder)
    return whole


def _read_generation_config(model: Any, folder: str | os.PathLike[str]) -> None:
    """How the folder says that the model generates, as `from_pretrained` reads it: where it stops, how it samples."""
    own = getattr(model, "generation_config", None)
    if own is None or not os.path.isfile(os.path.join(folder, "generation_config.json")):
        return
    read = type(own).from_pretrained(folder, local_files_only=True)
    try:
        read.validate(strict=True)  # what transformers would not write must not end a save
    except ValueError as error:
        warnings.warn(f"{folder}: generation_config.json is not read, as it is not valid: {error}", stacklevel=3)
        return
    model.generation_config = read


def _added_on_meta(
    model: nn.Module,
    adapters: Adapters,
    held: Mapping[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    boxes: dict[str, Box],
    names: dict[str, str],
) -> list[str]:
    """The adapters' tensors that need values of their own; copies of modules of the base model begin as those do."""
    copies = {n: own for n, (own, _) in adapters.trained.items() if own in names and held[n].is_meta}
    for name, own in copies.items():
        tensors[name], names[name], boxes[name] = held[name], names[own], _box(held[name], name)
    added = [name for name in adapters.trained if held[name].is_meta and name not in copies]
    check_initialised(model, adapters, added)
    return added


def _sources(model: nn.Module, tensors: Mapping[str, torch.Tensor], found: Mapping[str, Lazy]) -> dict[str, str]:
    """For each name of the model the name to read: its own, or that of a weight it is tied to."""
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    ties = tied_sources(model)
    sources: dict[str, str] = {}
    for group in tied.values():
        held = sorted((n for n in group if n in found), key=lambda n: n in ties)
        # A pipeline part may hold a head that is tied to an embedding of another part.
        held = held or [ties[n] for n in group if ties.get(n) in found]
        for other in held[1:]:
            if not _equal(found[held[0]], found[other]):
                raise ValueError(f"the folder holds different values for {held[0]} and {other}, which the model ties")
        sources |= {name: held[0] for name in group if held}
    return sources


def _equal(one: Lazy, other: Lazy) -> bool:
    """Compare some rows at a time, as numbers of the wider dtype."""
    if one.shape != other.shape:
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    pairs = zip(_blocks(one, dtype), _blocks(other, dtype), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def _fits(held: Lazy, wanted: torch.dtype) -> bool:
    """Whether no finite number becomes infinite; whole where the range is smaller, so that all ranks say the same."""
    if not held.is_floating_point() or torch.finfo(wanted).max >= torch.finfo(held.dtype).max:
        return True
    blocks = _blocks(held, held.dtype)
    return all(bool((torch.isfinite(block) <= torch.isfinite(block.to(wanted))).all()) for block in blocks)


def _blocks(lazy: Lazy, dtype: torch.dtype, numbers: int = 1 << 22) -> Iterator[torch.Tensor]:
    rows = max(1, numbers // max(1, math.prod(lazy.shape[1:])))
    for start in range(0, lazy.shape[0] if lazy.dim() else 1, rows):
        ends = [(start, min(start + rows, lazy.shape[0]))] if lazy.dim() else []
        box = [*ends, *((0, size) for size in lazy.shape[1:])]
        block = torch.empty([stop - begin for begin, stop in box], dtype=dtype)
        lazy.read_into(block, box)
        yield block


def _check_fit(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    found: Mapping[str, Lazy],
    names: Mapping[str, str],
    source: HFFolder,
    strict: bool,
) -> None:
    used = {*tensors, *names.values()}
    shapes, dtypes, ranges, hooked = [], [], [], []
    for name, tensor in tensors.items():
        if name in names:
            held = found[names[name]]
            if held.shape != tensor.shape:
                shapes.append(f"{name}: {tuple(held.shape)} in the folder, {tuple(tensor.shape)} in the model")
            if not _converts(held.dtype, tensor.dtype):
                dtypes.append(f"{name}: {held.dtype} in the folder, {tensor.dtype} in the model")
            elif not _fits(held, tensor.dtype):
                ranges.append(f"{name}: {held.dtype} in the folder, {tensor.dtype} in the model")
        if tensor.is_meta and has_gradient_hooks(tensor):
            hooked.append(name)
    problems = {
        "it lacks": [n for n in tensors if n not in names],
        "the model has no": [n for n in found if n not in used] if strict else [],
        "shapes differ:": shapes,
        "dtypes do not convert (quantised?):": dtypes,
        "values are beyond the range of the model's dtype:": ranges,
        "on meta with gradient hooks, which memory would lose (load before the first forward):": hooked,
    }
    told = [f"{words} {some(which)}" for words, which in problems.items() if which]
    if told:
        raise ValueError(f"{source.folder} does not fit {type(model).__name__}: " + "; ".join(told))


def _converts(held: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether values of one dtype become those of the other, but for rounding and for the range of floats."""
    if held == wanted:
        return True
    if held.is_complex or wanted.is_complex:
        return held.is_complex and wanted.is_complex
    if held.is_floating_point or wanted.is_floating_point:
        return held.itemsize > 1 and held.is_floating_point and wanted.is_floating_point
    if torch.bool in (held, wanted):
        return False
    return torch.iinfo(wanted).min <= torch.iinfo(held).min and torch.iinfo(held).max <= torch.iinfo(wanted).max


def _box(tensor: torch.Tensor, name: str) -> Box:
    if not isinstance(tensor, DTensor):
        return [(0, size) for size in tensor.shape]
    try:
        return local_box(tensor)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read into: {error}") from error


def _home(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """The device of the mesh that the model is on; of its real tensors, or the CPU, where it is on none."""
    for tensor in tensors.values():
        if isinstance(tensor, DTensor):
            kind = tensor.device_mesh.device_type
            return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    return next((t.device for t in tensors.values() if not t.is_meta), torch.device("cpu"))


def _with_memory(model: nn.Module, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory for the local part of a tensor on meta; a parameter stays the object that others hold."""
    new = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        for name, value in vars(tensor).items():
            vars(new).setdefault(name, value)
        torch.utils.swap_tensors(tensor, new)
        return tensor
    for module in model.modules():
        for name, held in module.named_buffers(recurse=False, remove_duplicate=False):
            if held is tensor:
                setattr(module, name, new)
    return new
