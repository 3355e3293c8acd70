"""Refuse a start whose ranks were started differently: other arguments, another seed, another text."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist


def refuse_differences(store: dist.Store, rank: int, world_size: int, facts: dict[str, Any]) -> None:
    """Compare what every rank was started with; no process group is needed, only the store that will make it.

    Args:
        store: what all ranks of this start share, as `dist.rendezvous` gives it.
        facts: what must be the same everywhere, by the name the user knows it by ("--seed"); compared as text.

    Raises:
        ValueError: on every rank, with each name that differs, its values, and the ranks that have them.
    """
    store.set(f"facts of {rank}", json.dumps({name: str(value) for name, value in facts.items()}))
    if rank == 0:
        everyone = [json.loads(store.get(f"facts of {r}")) for r in range(world_size)]
        store.set("differences", json.dumps(_differences(everyone)))
    found = json.loads(store.get("differences"))
    if found:
        raise ValueError(f"the ranks were started differently: {'; '.join(found)}")


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(facts.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value} on rank {', '.join(map(str, some))}" for value, some in ranks.items())
            lines.append(f"{name} is {', '.join(values)}")
    return lines
