"""What a rank holds, in bytes."""

from __future__ import annotations

import resource
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def weights_held(parts: list[nn.Module]) -> int:
    """The bytes of this rank's shards of all parameters, each once."""
    parameters = {id(p): p for part in parts for p in part.parameters()}.values()
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def most_in_use(device: torch.device) -> int:
    """The most bytes that this process has had at once: on a GPU of tensors, on the CPU of all."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.accelerator.max_memory_allocated(device)


def of_every_rank(number: float, device: torch.device) -> list[float]:
    """Everyone's number. One all-gather over the default group."""
    mine = torch.tensor([number], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [float(one) for one in everyone]
