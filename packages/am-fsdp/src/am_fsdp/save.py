"""A model that is laid out over ranks, written as a Hugging Face folder: one tensor gathered at a time."""

from __future__ import annotations

import copy
import hashlib
import os
import pathlib
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from am_fsdp.hf_folder import FileWriter, files_of, write_index
from am_fsdp.hf_names import folder_tensors, named_tensors, own_classes, some, tied_sources
from am_fsdp.lazy import Box, Lazy

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
_TOLD = 1024  # bytes of an error that ranks tell each other


@torch.no_grad()
def save_hf_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a model that is laid out over ranks as a folder that `from_pretrained` loads.

    Keys are those that `save_pretrained` writes: experts one key each where transformers does so, tied weights once;
    the configs of a transformers model lie beside them. Ranks take turns as the writers of files. One tensor of the
    model is gathered at a time; a writer holds one tensor of the folder besides.

    Args:
        model: the whole model on every rank of `group`, in any layout. Parameters without a mesh must be the same on
            every rank.
        folder: made if absent; must not hold weights already; every writer sees it.
        max_shard_size: of a file, in bytes or as "500MB"; a larger tensor has a file of its own.
        dtype: to write floating-point parameters in; None for theirs.
        group: all ranks that hold the model; the default group if None, one process where there is none.

    Collectives: over `group` three exchanges of a kilobyte; per parameter an all-gather over each axis that shards it.

    Raises:
        ValueError: the folder holds weights, `max_shard_size` is no size, a parameter is on meta or a partial sum, the
            ranks hold different models (pipeline parts), this rank is not in `group`, or transformers cannot revert a
            conversion; on every rank alike, before anything is written.
        OSError: a writer failed; on every rank alike, when all other files are written.
    """
    if _rank(group) < 0:
        raise ValueError("this rank is not in group; only ranks that hold the model and are in it save")
    target = pathlib.Path(folder)
    tensors = named_tensors(model)
    files: dict[str, dict[str, Lazy]] = {}
    problem = ""
    try:
        limit = _bytes(max_shard_size)
        _check(target, tensors, dtype)
        files = files_of(_to_write(model, tensors, dtype), limit)
    except (TypeError, ValueError) as error:
        problem = str(error)
    device = next((t.device for t in tensors.values() if isinstance(t, DTensor)), torch.device("cpu"))
    described = [(f, k, tuple(t.shape), str(t.dtype)) for f, held in files.items() for k, t in held.items()]
    told = _exchange(problem or "=" + hashlib.sha256(repr(described).encode()).hexdigest(), group, device)
    problem = next((text for text in told if not text.startswith("=")), "")
    if not problem and len(set(told)) > 1:
        problem = (
            f"the ranks of the group hold different tensors of {type(model).__name__}, as pipeline parts do; every "
            "rank must hold the whole model. Pass as group the ranks that hold the same"
        )
    if problem:
        raise ValueError(problem)
    failure = _write(target, files, _rank(group), len(told))
    _raise_first(_exchange(failure, group, device))
    failure = _write_around(model, target, files, dtype) if _rank(group) == 0 else ""
    _raise_first(_exchange(failure, group, device))


def _bytes(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", size.strip().upper())
        size = int(float(match[1]) * _UNITS[match[2]]) if match else -1
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError("max_shard_size must be a positive number of bytes, or a size such as '5GB' or '500MB'")
    return size


def _check(target: pathlib.Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is not a folder")
    weights = r"(pytorch_)?model.*\.(safetensors|bin|json)"
    present = sorted(p.name for p in target.glob("*") if re.fullmatch(weights, p.name))
    if present:
        raise ValueError(f"{target} holds weights already ({some(present)}); save to another folder or delete them")
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"there is nothing to save in tensors on the meta device: {some(empty)}")
    sums = [n for n, t in tensors.items() if isinstance(t, DTensor) and any(p.is_partial() for p in t.placements)]
    if sums:
        raise ValueError(f"partial sums cannot be saved: {some(sums)}")


def _to_write(model: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, Lazy]:
    """The folder's tensors as functions of the model's, gathered when they are read, once for reads in a row."""
    last: dict[str, torch.Tensor] = {}

    def leaf(name: str, tensor: torch.Tensor) -> Lazy:
        def read(out: torch.Tensor, box: Box) -> None:
            if name not in last:
                last.clear()
                last[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if not out.is_meta:
                out.copy_(last[name][tuple(slice(*ends) for ends in box)])

        converts = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return Lazy.of(tensor.shape, dtype if converts else tensor.dtype, read)

    ties = tied_sources(model)
    once = {id(tensors[name]): name for name in sorted(tensors, key=lambda n: n not in ties)}
    return folder_tensors(model, {n: leaf(n, t) for n, t in tensors.items() if once[id(t)] == n})


def _write(target: pathlib.Path, files: dict[str, dict[str, Lazy]], rank: int, ranks: int) -> str:
    """Write this rank's files and take part in gathering the others'; returns what went wrong, after all of it."""
    failure = ""
    for number, (file, tensors) in enumerate(files.items()):
        writer = None
        if number % ranks == rank and not failure:
            try:
                target.mkdir(parents=True, exist_ok=True)
                writer = FileWriter(target / file, tensors)
            except OSError as error:
                failure = f"{target / file}: {error}"
        for tensor in tensors.values():
            device = "cpu" if writer is not None else "meta"
            whole = tensor.fill(torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
            if writer is not None and not failure:
                try:
                    writer.write(whole)
                except OSError as error:
                    failure = f"{target / file}: {error}"
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                failure = failure or f"{target / file}: {error}"
    return failure


def _write_around(
    model: nn.Module, target: pathlib.Path, files: dict[str, dict[str, Lazy]], dtype: torch.dtype | None
) -> str:
    """The index, and the configs of a model that has them; returns what went wrong."""
    try:
        if len(files) > 1:
            write_index(target, files)
        config = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            config = copy.deepcopy(config)
            config.dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
            with own_classes(model):
                config.architectures = [type(model).__name__]
            config.save_pretrained(target)
            generation: Any = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(target)
    except (OSError, ValueError) as error:  # transformers refuses to write some generation configs
        return f"{target}: {error}"
    return ""


def _raise_first(failures: list[str]) -> None:
    for failure in failures:
        if failure:
            raise OSError(failure)


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _exchange(text: str, group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """What every rank of the group says, by rank. (`all_gather_object` needs numpy, which torch does not bring.)"""
    if not (dist.is_available() and dist.is_initialized()):
        return [text]
    said = text.encode()[:_TOLD].ljust(_TOLD, b"\0")
    mine = torch.tensor(list(said), dtype=torch.uint8, device=device)
    heard = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(heard, mine, group=group)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in heard]
