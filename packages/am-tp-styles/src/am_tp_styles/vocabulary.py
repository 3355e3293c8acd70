"""Which ids of a vocabulary lie in this rank's rows of an embedding."""

from __future__ import annotations

import torch

from am_tp_styles.axis import Axis, part_of


def rows_here(
    ids: torch.Tensor, held: int, whole: int, axis: Axis, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Ids as rows of this rank's shard, which of them lie here, and the padding row if it does.

    An id outside the whole vocabulary becomes a row that no shard has, so that the lookup fails on every rank as it
    does in one process: at once on the CPU, by the kernel's own assertion on a device, which nothing waits for.

    Args:
        ids: any shape, int.
        held: rows of this rank's shard.
        whole: rows of the whole embedding.
    """
    first, _ = part_of(whole, axis)
    rows = ids - first
    here = (rows >= 0) & (rows < held)
    rows = rows.clamp(0, held - 1).masked_fill((ids < 0) | (ids >= whole), held)
    padded_here = padding_idx is not None and first <= padding_idx < first + held
    return rows, here, padding_idx - first if padded_here else None
