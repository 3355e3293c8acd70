"""What went wrong on one rank in the middle of a step, so that the others hear of it when the step ends.

A rank that waits for a message cannot be interrupted. So a rank that fails keeps the schedule going: it sends zeros of
the agreed shapes, computes nothing more, and after the step all ranks of the pipeline vote.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_TEXT_BYTES = 1024


@dataclass
class StepFailure:
    """The first error of this rank in the running step; its stages and its schedule share one.

    Attributes:
        error: the exception, None while all is well.
        text: which rank, stage and microbatch, and the exception's own words.
        skips: whether the stages hand on zeros from here on.
    """

    error: Exception | None = None
    text: str = ""
    skips: bool = False

    def record(self, where: str, error: Exception, skips: bool = True) -> None:
        self.skips = self.skips or skips
        if self.error is None:
            self.error = error
            self.text = f"rank {dist.get_rank()}, {where}: {type(error).__name__}: {error}"
            logger.error("%s; the step goes on with zeros until the other ranks can be told", self.text)


def vote(failure: StepFailure, group: dist.ProcessGroup) -> None:
    """End a step: all ranks return, or all raise what went wrong on any of them.

    Collectives (`group`, on the CPU): an all-reduce of one int64; after a failure an all-gather of a kilobyte. The host
    waits for the hosts of the other ranks to have issued the step, never for a device: an error is raised by a host,
    so there is nothing on a device to wait for.

    Raises:
        RuntimeError: what each failing rank recorded, on every rank; on a failing one from the original exception.
    """
    failed = torch.tensor(int(failure.error is not None))
    dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failed.item():
        texts = [text for text in _gather_texts(failure.text, group) if text]
        raise RuntimeError("the pipeline step failed: " + "; ".join(texts)) from failure.error


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks for tensors on the CPU: the group itself where it takes them, else a new gloo group.

    Called by all ranks of `group` together, and by those alone.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", use_local_synchronization=True))


def _gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    data = text.encode()[:_TEXT_BYTES]
    row = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group=group)
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in rows]
