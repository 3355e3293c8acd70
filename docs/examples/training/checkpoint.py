"""Sharded checkpoints with torch.distributed.checkpoint: names are the model's own, whatever the layout."""

from __future__ import annotations

import os
import pathlib
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

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save(folder: pathlib.Path, step: int, parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """Write `folder/step-NNNNNN`, then let `folder/latest` name it: a save that is cut off leaves the last one."""
    target = folder / f"step-{step:06d}"
    dcp.save(_state(step, parts, optimizers), checkpoint_id=target)
    dist.barrier()
    if dist.get_rank() == 0:
        pointer = folder / "latest.new"
        pointer.write_text(target.name)
        os.replace(pointer, folder / "latest")


def latest(folder: pathlib.Path) -> pathlib.Path:
    """The last complete checkpoint.

    Raises:
        ValueError: there is none.
    """
    pointer = folder / "latest"
    if not pointer.is_file() or not (folder / pointer.read_text() / ".metadata").is_file():
        raise ValueError(f"--resume: {folder} holds no complete checkpoint")
    return folder / pointer.read_text()


def load(path: pathlib.Path, parts: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> int:
    """Read a checkpoint into the parts and their optimizers; returns the step it was written after."""
    state = _state(0, parts, optimizers)
    dcp.load(state, checkpoint_id=path)
    for part, optimizer in zip(parts, optimizers, strict=True):
        first = _first_names(part)
        mine = get_model_state_dict(part)
        set_model_state_dict(part, {name: state["model"][first(name)] for name in mine})
        mine = get_optimizer_state_dict(part, optimizer, options=_FLAT)
        set_optimizer_state_dict(
            part, optimizer, {name: state["optimizer"][first(name)] for name in mine}, options=_FLAT
        )
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
