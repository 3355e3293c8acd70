"""What went wrong on one rank in the middle of a step, so that the others hear of it when the step ends.

A rank that waits for a message cannot be interrupted. So a rank that fails keeps the schedule going: it sends zeros of
the agreed shapes, takes part in what others gather with it, computes nothing more, and after the step all ranks vote.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
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


def vote(failure: StepFailure, groups: Sequence[dist.ProcessGroup]) -> None:
    """End a step: all ranks return, or all raise what went wrong on any of them.

    Args:
        failure: this rank's.
        groups: `host_group` of the pipeline, and of each other axis along which ranks step together.

    Collectives (each of `groups`, on the CPU): an all-reduce of one int64; after a failure an all-gather of a kilobyte.
    The host waits for the hosts of the other ranks to have issued the step, never for a device: an error is raised by a
    host, so there is nothing on a device to wait for.

    Raises:
        RuntimeError: what each failing rank recorded, on every rank; on a failing one from the original exception.
    """
    if failed_anywhere(failure, groups):
        raise RuntimeError(f"the pipeline step failed: {_all_texts(failure.text, groups)}") from failure.error


def failed_anywhere(failure: StepFailure, groups: Sequence[dist.ProcessGroup]) -> bool:
    """Whether any rank that the groups connect has failed in this step so far.

    Collectives (each of `groups`, on the CPU): an all-reduce of one int64.
    """
    return bool(_largest(int(failure.error is not None), groups))


def refuse_together(refusal: Exception | None, groups: Sequence[dist.ProcessGroup]) -> None:
    """Tell the other pipelines what this one agreed on, before its parts wait for theirs.

    Args:
        refusal: why this pipeline cannot run the step, the same on all its ranks; None if it can.
        groups: `host_group` of each other axis along which ranks step together; none for a pipeline by itself.

    Collectives (each of `groups`, on the CPU): as for `vote`.

    Raises:
        ValueError, TypeError, RuntimeError: the refusal, or that of another pipeline in its words.
    """
    if groups:
        kind = _largest(0 if refusal is None else kind_of(refusal), groups)
        if kind:
            text = _all_texts("" if refusal is None else str(refusal), groups)
            refusal = refusal or ERRORS[kind - 1](text)
    if refusal is not None:
        raise refusal


def differ(number: int, groups: Sequence[dist.ProcessGroup]) -> bool:
    """Whether any of the ranks that the groups connect has another non-negative number than this one.

    Collectives (each of `groups`, on the CPU): an all-reduce of two int64.
    """
    least_and_most = torch.tensor([-number, number])
    for group in groups:
        dist.all_reduce(least_and_most, dist.ReduceOp.MAX, group=group)
    least, most = least_and_most.tolist()
    return -least != most


def kind_of(error: Exception) -> int:
    """1 + its place in `ERRORS`; of a kind that is not there, that of RuntimeError."""
    return 1 + next((place for place, kind in enumerate(ERRORS) if isinstance(error, kind)), len(ERRORS) - 1)


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks for tensors on the CPU: the group itself where it takes them, else a new gloo group.

    Called by all ranks of `group` together, and by those alone.
    """
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", use_local_synchronization=True))


def _largest(word: int, groups: Sequence[dist.ProcessGroup]) -> int:
    """Over all ranks that the groups connect: one axis after the other."""
    largest = torch.tensor(word)
    for group in groups:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


def _all_texts(text: str, groups: Sequence[dist.ProcessGroup]) -> str:
    for group in groups:
        data = text.encode()[:_TEXT_BYTES]
        row = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row, group=group)
        texts = [bytes(each.tolist()).rstrip(b"\0").decode(errors="ignore") for each in rows]
        text = "; ".join(dict.fromkeys(each for each in texts if each))
    return text
