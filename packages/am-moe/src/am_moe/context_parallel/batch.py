"""A batch's part for this rank, with its labels already shifted, and whole tensors from parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from am_moe._torch_compat import all_gather
from am_moe.context_parallel.plan import head_tail

IGNORED = -100
# How the names of what images and videos are made of start; these are whole on every rank.
_OF_IMAGES = ("pixel_", "image_", "video_", "second_per_grid")
# The number of labels that belongs to each kind of them.
COUNTS = {"shift_labels": "num_items_in_batch", "labels": "num_labels_in_batch"}


def shard_batch(
    batch: Mapping[str, Any], cp_mesh: DeviceMesh, average_mesh: DeviceMesh | None = None
) -> dict[str, Any]:
    """This rank's part of a batch that every rank of the context axis holds whole.

    Tensors whose first dims are those of `input_ids` (or `inputs_embeds`) are cut along the sequence, one chunk from
    the head and one from the tail per rank. Labels are cut as they are, for losses that do not shift, and shifted over
    the whole sequence first, so that the last token of a chunk predicts the first of the next. What there is one of for
    a row (`labels` of sequence classification, `start_positions`) stays whole, and so do images (`pixel_values`,
    `image_grid_thw` and the like), which every rank of the axis turns into embeddings.

    The result goes to a transformers model as it is, `model(**shard)`: the loss it returns is the sum over this rank's
    labels divided by `num_items_in_batch`, so that **the average of the ranks' losses is the mean over all labels**,
    and gradients averaged over the ranks (by FSDP2 or DDP over the flattened data and context axis, or by hand) are
    those of one process. For other models, or a loss in another dtype, use `shard_loss`.

    Args:
        batch: `input_ids` or `inputs_embeds`; `labels`, not shifted, -100 where ignored, as transformers takes them;
            `position_ids` `(B, S)` or `(1, S)`, which start anew where a packed document does; without them tokens are
            counted from 0. `attention_mask` `(B, S)`, 1 for tokens and 0 for padding; with one, documents are not kept
            apart (so does transformers). `shift_labels`, if they are not the shifted `labels`. `num_items_in_batch`, a
            number or 0-dim tensor, if the loss is to be divided by another number than that of the labels here, as
            under gradient accumulation: of all batches that are added up, on this data rank. What is not a tensor is
            passed on.
        cp_mesh: the context axis, or both axes of `a2a+p2p`, as given to `apply_cp`.
        average_mesh: the ranks over which gradients will be averaged where they hold other batches too (the flattened
            data and context axis): labels are then counted over all of it. Without it each batch counts the same,
            whatever its number of labels.

    Returns:
        The batch with `position_ids` and, if there were labels of tokens, `labels` and `shift_labels` (this rank's)
        and how many of each that are not -100 there are, divided by the ranks: `num_labels_in_batch` and
        `num_items_in_batch` (float tensors). Where `num_items_in_batch` was given, that divided by the ranks, and no
        `num_labels_in_batch`: losses over labels that are not shifted are then refused by the model's forward.

    Collectives: one all-reduce of one or two numbers over `average_mesh`, if given.

    Raises:
        ValueError: a length that does not divide by twice the ranks of the axis, tensors of other shapes, images with
            `position_ids` (the model counts positions from the images itself); on every rank alike.
    """
    tokens = batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        raise ValueError(f"batch needs input_ids (B, S) or inputs_embeds (B, S, D); it has {sorted(batch)}")
    rows, seq_len = tokens.shape[:2]
    head_tail(seq_len, cp_mesh.size())
    whole = {name: value for name, value in batch.items() if value is not None}
    if "position_ids" in whole and any(is_of_images(name) for name in whole):
        raise ValueError("a batch with images takes no position_ids: the model counts positions from its images")
    items = whole.pop("num_items_in_batch", None)
    whole.setdefault("position_ids", torch.arange(seq_len, device=tokens.device)[None].expand(rows, -1))
    labels = whole.get("labels")
    labelled = labels is not None and labels.shape == (rows, seq_len) and not labels.is_floating_point()
    if labelled:
        whole.setdefault("shift_labels", nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:])
    shard: dict[str, Any] = {}
    for name, value in whole.items():
        if is_of_images(name) or not isinstance(value, torch.Tensor) or _is_by_row(name, value, rows, labelled):
            shard[name] = value
        else:
            allowed = ((rows, seq_len), (1, seq_len)) if name == "position_ids" else ((rows, seq_len),)
            if value.shape[:2] not in allowed or (name in ("position_ids", "attention_mask") and value.dim() != 2):
                raise ValueError(
                    f"batch[{name!r}] has shape {tuple(value.shape)}, which does not start with {(rows, seq_len)}: it "
                    "cannot be cut along the sequence. Leave it out; documents are packed by position_ids, padding is "
                    "an attention_mask (B, S), and sounds are not for context parallelism"
                )
            shard[name] = shard_sequence(value, cp_mesh)
    if labelled:
        numbers = [(whole[kind] != IGNORED).sum() for kind in COUNTS]
        if items is not None:
            numbers = [torch.as_tensor(items, device=tokens.device).reshape(())]
        counts = torch.stack(numbers).to(torch.float32) / cp_mesh.size()
        if average_mesh is not None:
            dist.all_reduce(counts, group=_group_of(average_mesh))
            counts /= average_mesh.size()
        shard |= dict(zip(COUNTS.values(), counts.unbind(), strict=False))
    elif items is not None:
        shard["num_items_in_batch"] = items
    return shard


def is_of_images(name: str) -> bool:
    """Whether an argument of that name is what images or videos are made of."""
    return name.startswith(_OF_IMAGES)


def _is_by_row(name: str, value: torch.Tensor, rows: int, labelled: bool) -> bool:
    """Whether a tensor has something for each row of the batch, such as its class, and nothing for its tokens."""
    if value.shape[:1] != (rows,) or name.startswith("cu_seq"):
        return False
    return value.dim() == 1 or (name == "labels" and not labelled)


def shard_loss(logits: torch.Tensor, shard: Mapping[str, Any]) -> torch.Tensor:
    """The loss of this rank's part: cross entropy of `(B, S, V)` logits in their own dtype, summed, over the count.

    Args:
        logits: of the tokens of `shard`.
        shard: what `shard_batch` returned; `shift_labels` and `num_items_in_batch` are read.
    """
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), shard["shift_labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss / shard["num_items_in_batch"].to(loss.dtype)


def shard_sequence(tensor: torch.Tensor, cp_mesh: DeviceMesh, dim: int = 1) -> torch.Tensor:
    """This rank's tokens of a tensor that is whole on every rank: its head chunk, then its tail chunk.

    Raises:
        ValueError: a length that does not divide by twice the ranks of the axis.
    """
    intervals = head_tail(tensor.shape[dim], cp_mesh.size())[_rank_in(cp_mesh)]
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in intervals], dim)


def unshard_sequence(tensor: torch.Tensor, cp_mesh: DeviceMesh, dim: int = 1) -> torch.Tensor:
    """The inverse of `shard_sequence`: the whole tensor, in order, on every rank. Not differentiable.

    Collectives: an all-gather over each axis of `cp_mesh`.
    """
    parts = tensor.detach()[None].contiguous()
    for axis in reversed(range(cp_mesh.ndim)):
        gathered = parts.new_empty(cp_mesh.size(axis) * parts.shape[0], *parts.shape[1:])
        all_gather(gathered, parts, group=cp_mesh.get_group(axis))
        parts = gathered
    dim = dim % tensor.dim()
    return in_order(parts.movedim(0, dim).flatten(dim, dim + 1), cp_mesh.size(), dim)


def in_order(tensor: torch.Tensor, ranks: int, dim: int = 1) -> torch.Tensor:
    """The parts of all ranks, one after the other along `dim`, in the order of the sequence."""
    chunks = tensor.chunk(2 * ranks, dim=dim)
    return torch.cat([*chunks[::2], *chunks[:0:-2]], dim=dim)


def _rank_in(mesh: DeviceMesh) -> int:
    rank = 0
    for axis in range(mesh.ndim):
        rank = rank * mesh.size(axis) + mesh.get_local_rank(axis)
    return rank


def _group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        raise ValueError(f"average_mesh must have one axis, got {mesh.mesh_dim_names}; flatten it first")
    return mesh.get_group()
