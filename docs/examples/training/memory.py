"""What a rank holds, in bytes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def weights_held(parts: list[nn.Module]) -> int:
    """The bytes of this rank's shards of all parameters, each once."""
    parameters = {id(p): p for part in parts for p in part.parameters()}.values()
    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def of_every_rank(number: float, device: torch.device) -> list[float]:
    """Everyone's number. One all-gather over the default group."""
    mine = torch.tensor([number], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [float(one) for one in everyone]
