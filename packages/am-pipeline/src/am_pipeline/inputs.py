"""Inputs of a step: what only the first rank was given reaches the others, and all of it is split into microbatches."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

# Inputs of encoders before the decoder. Later stages do not hold those and get what they computed in the hidden state.
ENCODER_INPUTS = (
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "image_hidden_states",
    "input_features",
    "audio_values",
    "image_pixel_values",
    "input_image_embeds",
    "input_audio_embeds",
)

_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def share_from_first(
    mine: dict[str, Any], first_rank: int, group: dist.ProcessGroup, device: torch.device
) -> dict[str, Any]:
    """The keyword inputs of the first stage's rank, on every rank; what a rank was given itself, it keeps.

    Args:
        mine: this rank's keyword inputs; on `first_rank`, those to share: tensors, numbers, strings, None, or lists
            of tensors with one per microbatch.
        first_rank: the group rank that shares.
        group: the pipeline's process group.
        device: where the tensors are wanted.

    Collectives (pipeline axis): two broadcasts of a description, and one per tensor.

    Raises:
        TypeError: an input that is not of these kinds, on every rank.
    """
    source = dist.get_global_rank(group, first_rank)
    sends = dist.get_rank(group) == first_rank
    tensors: list[torch.Tensor] = []
    offered = {name: value for name, value in mine.items() if sends and name not in ENCODER_INPUTS}
    text = json.dumps({name: _describe(value, tensors) for name, value in offered.items()}) if sends else ""
    described = json.loads(_share_text(text, source, group, device))
    shared = {}
    for name, description in described.items():
        if description[0] == "unknown":
            raise TypeError(
                f"the input {name!r} is a {description[1]}; give tensors, numbers, strings or lists of one "
                "tensor per microbatch, or give it on every rank of the pipeline"
            )
        shared[name] = _receive(description, tensors, sends, source, group, device)
    return shared | mine


def split_inputs(
    args: tuple, kwargs: dict[str, Any], count: int, batch: int
) -> tuple[list[tuple], list[dict[str, Any]]]:
    """One tuple of positional and one dict of keyword inputs per microbatch.

    A tensor is split along its first dim of size `batch`, except that `position_ids` with a leading dim of
    coordinates `(3, B, S)` is split along its second; one without such a dim goes to every microbatch whole. A list
    or tuple of `count` tensors is taken as one per microbatch (packed sequences, images).

    Args:
        args, kwargs: of the whole batch.
        count: number of microbatches.
        batch: sequences in the batch, a multiple of `count`.
    """
    pieces = [_pieces("", value, count, batch) for value in args]
    named = {name: _pieces(name, value, count, batch) for name, value in kwargs.items()}
    return (
        [tuple(each[i] for each in pieces) for i in range(count)],
        [{name: each[i] for name, each in named.items()} for i in range(count)],
    )


def _pieces(name: str, value: Any, count: int, batch: int) -> list[Any]:
    if isinstance(value, torch.Tensor):
        dim = _batch_dim(name, value, batch)
        return [value] * count if dim is None else list(value.chunk(count, dim))
    if _is_list_of_tensors(value) and len(value) == count:
        return list(value)
    return [value] * count


def _batch_dim(name: str, value: torch.Tensor, batch: int) -> int | None:
    if name == "position_ids" and value.dim() == 3 and value.shape[1] == batch:
        return 1
    return next((dim for dim, size in enumerate(value.shape) if size == batch), None)


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, torch.Tensor) for v in value)


def _describe(value: Any, tensors: list[torch.Tensor]) -> list:
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES:
        tensors.append(value)
        return ["tensor", list(value.shape), _DTYPES.index(value.dtype)]
    if _is_list_of_tensors(value) and all(v.dtype in _DTYPES for v in value):
        return ["list", [_describe(v, tensors) for v in value]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    return ["unknown", type(value).__name__]


def _receive(description: list, tensors: list[torch.Tensor], sends: bool, source: int, group, device) -> Any:
    kind, what, *dtype = description
    if kind == "value":
        return what
    if kind == "list":
        return [_receive(each, tensors, sends, source, group, device) for each in what]
    if sends:
        tensor = tensors.pop(0).to(device).contiguous()
    else:
        tensor = torch.empty(what, dtype=_DTYPES[dtype[0]], device=device)
    if tensor.numel():
        dist.broadcast(tensor, source, group=group)
    return tensor


def _share_text(text: str, source: int, group, device) -> str:
    """Torch's own object collectives need numpy."""
    data = list(text.encode())
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, source, group=group)
    row = torch.tensor(data, dtype=torch.uint8, device=device) if data else torch.empty(int(size), dtype=torch.uint8)
    row = row.to(device)
    dist.broadcast(row, source, group=group)
    return bytes(row.tolist()).decode()
