"""Inputs of a step: what only the first rank was given reaches the others, and all of it is split into microbatches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
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

# Ids of the decoder's own sequences, whose length need not be that of the encoder's.
DECODER_IDS = "decoder_input_ids"

# Room for a description beside what the ranks agree on anyway; a longer one needs a message of its own.
TEXT_BYTES = 1024

_DTYPES = (torch.int64, torch.int32, torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe_inputs(mine: dict[str, Any], stay: AbstractSet[str]) -> tuple[str, list[torch.Tensor]]:
    """What the first stage's rank shares of its keyword inputs, in words that others allocate by; and the tensors.

    Args:
        mine: tensors, numbers, strings, None, or lists of tensors or None with one per microbatch.
        stay: names of those that are described and not sent: the stages that use them are on this rank.

    Raises:
        TypeError: an input that is not of these kinds.
    """
    tensors: list[torch.Tensor] = []
    described = {name: _describe(value, [] if name in stay else tensors) for name, value in mine.items()}
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
    stay: AbstractSet[str],
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
        stay: as for `describe_inputs`.

    Collectives (pipeline axis): one broadcast per tensor; before them one of the description, among hosts, where the
    given text is not all of it.
    """
    source = dist.get_global_rank(group, first_rank)
    sends = dist.get_rank(group) == first_rank
    if size > TEXT_BYTES:
        text = _share_text(text if sends else "", size, source, host_group)
    described = json.loads(text)
    return {
        name: _imagine(each, device) if name in stay else _receive(each, tensors, sends, source, group, device)
        for name, each in described.items()
    }


def decoder_length(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of the decoder's own sequences where there are any, else nothing: the third of `Sizes`.

    Raises:
        ValueError: microbatches of different lengths.
    """
    ids = inputs.get(DECODER_IDS)
    given = ids if isinstance(ids, (list, tuple)) else [ids]
    lengths = {tensor.shape[1] for tensor in given if isinstance(tensor, torch.Tensor) and tensor.dim() > 1}
    if len(lengths) > 1:
        raise ValueError(
            f"the microbatches of a step need {DECODER_IDS} of one length, as what stages send has it; they have "
            f"{sorted(lengths)}: pad them"
        )
    return tuple(lengths)


def images_length(inputs: Mapping[str, Any]) -> int | None:
    """The first dim of what a tower takes, the images or patches of one microbatch; None without any.

    Raises:
        ValueError: inputs of several towers.
    """
    given = [name for name in ENCODER_INPUTS if isinstance(inputs.get(name), torch.Tensor)]
    if len(given) > 1:
        raise ValueError(f"a tower that is cut takes one input, and there are {', '.join(given)}")
    return inputs[given[0]].shape[0] if given else None


def split_inputs(
    args: tuple, kwargs: dict[str, Any], count: int, batch: int, batch_dims: Mapping[str, int | None] | None = None
) -> tuple[list[tuple], list[dict[str, Any]]]:
    """One tuple of positional and one dict of keyword inputs per microbatch.

    Args:
        args: of the whole batch; split along dim 0.
        kwargs: of the whole batch. A list or tuple with one tensor or None for each microbatch is taken as that (packed
            sequences, images); what is no tensor goes to every microbatch whole.
        count: number of microbatches.
        batch: sequences in the batch.
        batch_dims: the dim along which a keyword input is split, by name; None for whole.

    Raises:
        ValueError: an input that could be split, of which nobody has said along which dim.
    """
    known = batch_dims or {}
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name not in known and batch in value.shape:
            raise ValueError(
                f"the input {name!r} of shape {tuple(value.shape)} has a dim of the batch's size, {batch}, which need "
                f"not be the batch: say which is with batch_dims={{{name!r}: ...}}, None for whole"
            )
    pieces = [list(value.chunk(count)) for value in args]
    named = {name: _pieces(value, count, known.get(name)) for name, value in kwargs.items()}
    return (
        [tuple(each[i] for each in pieces) for i in range(count)],
        [{name: each[i] for name, each in named.items()} for i in range(count)],
    )


def is_per_microbatch(value: Any, count: int) -> bool:
    """Whether an input is a list with one tensor, or None, for each microbatch."""
    return _is_list_of_tensors(value) and len(value) == count


def _pieces(value: Any, count: int, dim: int | None) -> list[Any]:
    if is_per_microbatch(value, count):
        return list(value)
    return [value] * count if dim is None else list(value.chunk(count, dim))


def _is_list_of_tensors(value: Any) -> bool:
    """Whether it is a list with a tensor, or None, for each microbatch; all of them may be None."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(v is None or isinstance(v, torch.Tensor) for v in value)


def _describe(value: Any, tensors: list[torch.Tensor]) -> list:
    if isinstance(value, torch.Tensor) and value.dtype in _DTYPES:
        tensors.append(value)
        return ["tensor", list(value.shape), _DTYPES.index(value.dtype), padding_images(value)]
    if _is_list_of_tensors(value) and all(v is None or v.dtype in _DTYPES for v in value):
        return ["list", [_describe(v, tensors) for v in value]]
    if value is None or isinstance(value, (bool, int, float, str)):
        return ["value", value]
    return ["unknown", type(value).__name__]


def padding_images(value: torch.Tensor) -> list[int]:
    """Which images `(rows, images, channels, ...)` are all zeros, counted through: those that pad a row to as many as
    another has, and that models leave out (Idefics)."""
    if value.dim() < 5 or not value.is_floating_point():
        return []
    images = value[(slice(None), slice(None), *[0] * (value.dim() - 2))] if not any(value.stride()[2:]) else value
    seen = images.reshape(value.shape[0] * value.shape[1], -1).any(1)
    return (~seen).nonzero().flatten().tolist()


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


def _imagine(description: list, device: torch.device) -> Any:
    """A tensor of that form without memory, where only the form of an input matters: ones, and zeros for padding."""
    kind, what, *more = description
    if kind == "list":
        return [_imagine(each, device) for each in what]
    if kind == "value":
        return what
    dtype, padding = more
    if not padding:
        return torch.ones((), dtype=_DTYPES[dtype], device=device).expand(what)
    images = torch.ones(what[0] * what[1], dtype=_DTYPES[dtype], device=device)
    images[padding] = 0
    return images.view(*what[:2], *[1] * (len(what) - 2)).expand(what)


def _share_text(text: str, size: int, source: int, group: dist.ProcessGroup) -> str:
    """Torch's own object collectives need numpy."""
    row = torch.tensor(list(text.encode()), dtype=torch.uint8) if text else torch.empty(size, dtype=torch.uint8)
    dist.broadcast(row, source, group=group)
    return bytes(row.tolist()).decode()
