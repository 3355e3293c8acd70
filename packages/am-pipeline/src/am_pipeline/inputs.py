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

# Room for a description beside what the ranks agree on anyway; a longer one needs a message of its own.
TEXT_BYTES = 1024

_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe_inputs(mine: dict[str, Any]) -> tuple[str, list[torch.Tensor]]:
    """What the first stage's rank shares of its keyword inputs, in words that others allocate by; and the tensors.

    Args:
        mine: tensors, numbers, strings, None, or lists of tensors with one per microbatch.

    Raises:
        TypeError: an input that is not of these kinds.
    """
    tensors: list[torch.Tensor] = []
    described = {name: _describe(value, tensors) for name, value in mine.items() if name not in ENCODER_INPUTS}
    for name, (kind, what, *_) in described.items():
        if kind == "unknown":
            raise TypeError(
                f"the input {name!r} is a {what}; give tensors, numbers, strings or lists of one "
                "tensor per microbatch, or give it on every rank of the pipeline"
            )
    return json.dumps(described, separators=(",", ":")), tensors


def receive_inputs(
    text: str,
    size: int,
    tensors: list[torch.Tensor],
    first_rank: int,
    group: dist.ProcessGroup,
    host_group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, Any]:
    """The keyword inputs that the first stage's rank shares, on every rank.

    Args:
        text: what `describe_inputs` said on that rank; elsewhere perhaps only its first `TEXT_BYTES` bytes.
        size: bytes of the whole description.
        tensors: what `describe_inputs` returned on that rank; empty on the others.
        first_rank: the group rank that shares.
        group: the pipeline's process group.
        host_group: a group of the same ranks for tensors on the CPU.
        device: where the tensors are wanted.

    Collectives (pipeline axis): one broadcast per tensor; before them one of the description, among hosts, where the
    given text is not all of it.
    """
    source = dist.get_global_rank(group, first_rank)
    sends = dist.get_rank(group) == first_rank
    if size > TEXT_BYTES:
        text = _share_text(text if sends else "", size, source, host_group)
    described = json.loads(text)
    return {name: _receive(each, tensors, sends, source, group, device) for name, each in described.items()}


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


def _share_text(text: str, size: int, source: int, group: dist.ProcessGroup) -> str:
    """Torch's own object collectives need numpy."""
    row = torch.tensor(list(text.encode()), dtype=torch.uint8) if text else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(row, source, group=group)
    return bytes(row.tolist()).decode()
