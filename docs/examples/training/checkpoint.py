"""Sharded checkpoints with torch.distributed.checkpoint: names are the model's own, whatever the layout."""

from __future__ import annotations

import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training import manifest

KEPT = 2  # complete checkpoints: the one before the last is still there while nobody has read the last
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(folder: pathlib.Path, step: int, parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """Write `folder/step-NNNNNN`, then let `folder/latest` name it, then remove all but the last two.

    Complete is what has a manifest, which is written last; whatever cuts a save off, those before it are whole.

    Raises:
        RuntimeError: on every rank, naming those that could not write and why; what they wrote is removed.
    """
    target = folder / f"step-{step:06d}"
    if dist.get_rank() == 0:
        _remove(target)  # of a save that was cut off, or damaged and passed over
    dist.barrier()
    try:
        dcp.save(_state(step, parts, optimizers), checkpoint_id=target)
    except dcp.api.CheckpointException as error:
        if dist.get_rank() == 0:
            _remove(target)
        raise RuntimeError(f"{target} could not be written: {_why(error)}; {_what_is_left(folder)}") from None
    manifest.write(target)
    if dist.get_rank() == 0:
        manifest.sync_folder(target)
        manifest.write_durably(folder / "latest", target.name)
        for path in folder.glob("step-*"):
            if path not in newest_first(folder)[:KEPT]:
                _remove(path)


def latest(folder: pathlib.Path) -> pathlib.Path:
    """The last complete checkpoint.

    Raises:
        ValueError: there is none.
    """
    found = newest_first(folder)
    if not found:
        raise ValueError(f"--resume: {folder} holds no complete checkpoint")
    return found[0]


def newest_first(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoint that `latest` names, and the complete ones before it, by their numbers."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return []
    named = folder / pointer.read_text()
    if _step(named) is None or named.parent != folder:
        return []
    complete = [path for path in folder.glob("step-*") if _step(path) is not None and (path / manifest.NAME).is_file()]
    return [named, *sorted((p for p in complete if _step(p) < _step(named)), key=_step, reverse=True)]


def _step(path: pathlib.Path) -> int | None:
    """The number of a checkpoint; None for what is not named like one. Numbers may have more digits than six."""
    found = re.fullmatch(r"step-([0-9]{6,15})", path.name)
    return int(found[1]) if found else None


def load(path: pathlib.Path, parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> int:
    """Read a checkpoint into the parts and their optimizers, which keep their learning rate; returns its step."""
    state = _state(0, parts, optimizers)
    dcp.load(state, checkpoint_id=path)
    for part, optimizer in zip(parts, optimizers, strict=True):
        first = _first_names(part)
        mine = get_model_state_dict(part)
        set_model_state_dict(part, {name: state["model"][first(name)] for name in mine})
        mine = get_optimizer_state_dict(part, optimizer, options=_FLAT)
        rates = [group["lr"] for group in optimizer.param_groups]
        set_optimizer_state_dict(
            part, optimizer, {name: state["optimizer"][first(name)] for name in mine}, options=_FLAT
        )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return int(state["step"])


def _state(step: int, parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    model, optimizer = {}, {}
    for part, one in zip(parts, optimizers, strict=True):
        first = _first_names(part)
        model |= {first(name): value for name, value in get_model_state_dict(part).items()}
        mine = get_optimizer_state_dict(part, one, options=_FLAT)
        optimizer |= {first(name): value for name, value in mine.items()}
    return {"model": model, "optimizer": optimizer, "step": torch.tensor(step)}


def _first_names(part: nn.Module) -> Callable[[str], str]:
    """Tied weights are saved under one name, which every layout knows: a pipeline may hold them on two stages."""
    tied = getattr(part, "all_tied_weights_keys", {})

    def first(name: str) -> str:
        for alias, original in tied.items():
            if name == alias or f".{alias}." in name:  # state.NAME.exp_avg, param_groups.NAME.lr
                return name.replace(alias, original)
        return name

    return first


def _remove(checkpoint: pathlib.Path) -> None:
    """The manifest first, so that what is half removed is not taken for complete."""
    (checkpoint / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def _why(error: dcp.api.CheckpointException) -> str:
    causes = {rank: f"{type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()}
    return "; ".join(f"rank {rank}: {words}" for rank, words in sorted(causes.items()))


def _what_is_left(folder: pathlib.Path) -> str:
    free = f"{shutil.disk_usage(folder).free:,} bytes are free there"
    complete = newest_first(folder)
    return f"{free}; {complete[0].name if complete else 'no checkpoint'} is the last complete one"
