"""Steps that ranks take apart and that end for all of them when one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from am_fsdp.process_group import device_of

T = TypeVar("T")
_TOLD = 1024  # bytes of an error that ranks tell each other
_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, ImportError)}


def together(step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run a step without collectives on every rank of a group; whatever goes wrong on one is raised on all.

    Collectives: two all-gathers over the group, of a length and of the message, where there is a process group.

    Raises:
        ValueError, TypeError, OSError, ImportError: with the message of the first rank that failed so.
        RuntimeError: with that of any other exception.
    """
    result, failure = None, ""
    try:
        result = step()
    except Exception as error:
        kind = next((name for name, each in _KINDS.items() if isinstance(error, each)), "RuntimeError")
        words = str(error) if kind in _KINDS else f"{type(error).__name__}: {error}"
        failure = f"{kind}\n{words}"[:_TOLD]
    for told in exchange(failure, group):
        if told:
            kind, _, words = told.partition("\n")
            raise _KINDS.get(kind, RuntimeError)(words)
    return result  # type: ignore[return-value]


def exchange(text: str, group: dist.ProcessGroup | None) -> list[str]:
    """What every rank of a group says, by rank. (`all_gather_object` needs numpy, which torch does not bring.)

    The tensors are on a device that the group has a backend for.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [text]
    device, said = device_of(group), text.encode(errors="replace")
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    lengths[dist.get_rank(group)] = len(said)
    dist.all_reduce(lengths, group=group)
    longest = max(lengths.tolist())
    if not longest:
        return [""] * len(lengths)
    mine = torch.tensor(list(said.ljust(longest, b"\0")), dtype=torch.uint8, device=device)
    heard = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(heard, mine, group=group)
    ends = lengths.tolist()
    return [bytes(one.tolist()[:end]).decode(errors="ignore") for one, end in zip(heard, ends, strict=True)]


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This rank's place in a group; 0 where there is no process group, -1 outside of it."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0
