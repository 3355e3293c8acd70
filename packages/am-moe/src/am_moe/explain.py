"""What expert parallelism would do to a model, from its shapes alone: no devices, no weights, no processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from am_moe.expert_parallel.experts import Experts, describe_experts

_CHOICES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


@dataclass(frozen=True)
class Explanation:
    """Attributes:
    kind: the model's class.
    layers: the experts modules, in order.
    ranks: P, the size of the expert axis.
    data: the data-parallel ranks that everything is sharded over.
    choices: K.
    width: D, the elements of a token's row.
    dtype: of rows and weights.
    expert_parameters, parameters: in experts, and in all.
    rows: how many rows leave a token's rank, on average over random routing, for one layer.
    """

    kind: str
    layers: tuple[Experts, ...]
    ranks: int
    data: int
    choices: int
    width: int
    dtype: torch.dtype
    expert_parameters: int
    parameters: int
    rows: float

    @property
    def forward_bytes(self) -> float:
        """Per token and layer: rows, weights (float32) and ids (int32) out, rows back; those that stay do not count."""
        row, numbers = self.width * self.dtype.itemsize, 4 * self.choices
        return self.rows * (row + _padded(row) + 2 * _padded(numbers))

    @property
    def backward_bytes(self) -> float:
        """Per token and layer: the gradients of what went forward, the other way; ids have none."""
        row, numbers = self.width * self.dtype.itemsize, 4 * self.choices
        return self.rows * (row + _padded(row) + _padded(numbers))

    @property
    def expert_bytes(self) -> float:
        """Of expert weights on each rank, sharded over the copies of the same experts too."""
        return self.expert_parameters * self.dtype.itemsize / max(self.data, self.ranks)

    @property
    def dense_bytes(self) -> float:
        """Of all other weights on each rank, sharded over the data ranks."""
        return (self.parameters - self.expert_parameters) * self.dtype.itemsize / self.data

    def held(self, rank: int) -> dict[int, range]:
        """The experts of a rank of the expert axis, by the number of experts of a layer."""
        counts = sorted({experts.num_experts for experts in self.layers})
        return {e: range(rank * e // self.ranks, (rank + 1) * e // self.ranks) for e in counts}

    def __str__(self) -> str:
        first = self.layers[0]
        lines = [
            f"{self.kind}: {len(self.layers)} layers with experts, {self.choices} of {first.num_experts} for a token",
            f"  {self.parameters / 1e9:.2f} B parameters, {self.expert_parameters / self.parameters:.0%} in experts",
            f"  {first}",
            f"an expert axis of {self.ranks}:",
        ]
        for rank in range(self.ranks):
            held = ", ".join(f"{r.start} to {r.stop - 1}" for r in self.held(rank).values())
            lines.append(f"  rank {rank}: experts {held} of each layer")
        sent_each = self.choices * (1 - 1 / self.ranks)
        lines += [
            f"on the wire, for each token and layer ({str(self.dtype).removeprefix('torch.')}, even routing):",
            f"  {self.rows:.2f} rows leave its rank; {sent_each:.2f} would if it travelled once for each expert",
            f"  {self.forward_bytes / 2**10:.1f} KiB forward, {self.backward_bytes / 2**10:.1f} KiB backward",
            f"weights on each rank, over {self.data} data ranks:",
            f"  experts {self.expert_bytes / 2**30:.2f} GiB, the rest {self.dense_bytes / 2**30:.2f} GiB",
            f"  with gradients and AdamW in that dtype {4 * (self.expert_bytes + self.dense_bytes) / 2**30:.2f} GiB",
        ]
        return "\n".join(lines)


def explain(model: nn.Module, ep: int, *, data: int | None = None, choices: int | None = None) -> Explanation:
    """Which rank would hold which experts, what a token sends, and what a rank has to hold.

    Args:
        model: a model with experts, best on the meta device.
        ep: the size of the expert axis.
        data: how many ranks hold different tokens, a multiple of `ep`; `ep` if None.
        choices: K, how many experts each token chooses; from `model.config` if None.

    Raises:
        ValueError: no experts, an axis that does not divide them, `data` that is no multiple, K that is unknown.
    """
    found = describe_experts(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts to explain")
    for experts in found:
        if ep < 1 or experts.num_experts % ep:
            fits = [d for d in range(1, experts.num_experts + 1) if experts.num_experts % d == 0]
            raise ValueError(f"ep {ep} does not divide the {experts.num_experts} experts of {experts.name}: {fits}")
    data = ep if data is None else data
    if data < 1 or data % ep:
        raise ValueError(f"data {data} must be a multiple of ep {ep}: experts spread over the data ranks")
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    sources = [text, getattr(text, "ffn_config", None)]
    named = (getattr(source, name, None) for source in sources for name in _CHOICES)
    choices = choices or next((n for n in named if isinstance(n, int)), None)
    if not choices:
        raise ValueError(f"{type(model).__name__} does not say how many experts a token chooses; pass choices")
    if not 0 < choices <= found[0].num_experts:
        raise ValueError(f"a token cannot choose {choices} of {found[0].num_experts} experts")
    stacked = [model.get_parameter(f"{e.name}.{path}".lstrip(".")) for e in found for path in e.stacked]
    return Explanation(
        kind=type(model).__name__,
        layers=tuple(found),
        ranks=ep,
        data=data,
        choices=choices,
        width=getattr(text, "hidden_size", None) or getattr(text, "d_model", 0),
        dtype=stacked[0].dtype,
        expert_parameters=sum(p.numel() for p in stacked),
        parameters=sum(p.numel() for p in model.parameters()),
        rows=leaving_rows(found[0].num_experts, choices, ep),
    )


def _padded(size: int) -> int:
    """What travels together starts at multiples of 16 bytes."""
    return size + -size % 16


def leaving_rows(experts: int, choices: int, ranks: int) -> float:
    """How many other ranks a token goes to, on average, if its K different experts are drawn evenly from E."""
    elsewhere = experts - experts // ranks
    missed = math.comb(elsewhere, choices) / math.comb(experts, choices) if choices <= experts else 0.0
    return (ranks - 1) * (1 - missed)
