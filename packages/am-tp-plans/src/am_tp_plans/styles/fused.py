"""Linears that torch's styles do not take: several projections side by side in one weight, and GPT-2's `Conv1D`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import once
from am_tp_styles.edges import Edges, enter, leave
from am_tp_styles.layer_parameters import note_local
from am_tp_styles.local_parameters import local
from am_tp_styles.style import LocalStyle


class PackedColwiseParallel(LocalStyle):
    """Colwise for a fused linear: each rank computes its share of every one of the projections in it.

    The weight is stored in plain rows, `Shard(0)` of the whole, so that checkpoints, FSDP2 and optimizers see an
    ordinary DTensor; before use the ranks exchange the rows that belong to another's share. (A placement that says
    which part of each projection a rank has would save that, but neither checkpoints nor FSDP2 keep torch's.)

    For `nn.Linear`, and with `parts=1` the colwise style for `Conv1D`.

    Args:
        parts: the widths of the projections in the output, or how many equal ones there are.
        input_layouts: of the input `(B, S, in)`: `Replicate()`, or `Shard(1)` for sequence parallelism.

    Output: a plain tensor `(B, S, out / n)`, the rank's shares one after the other.

    Collectives (the given axis): an all-to-all of at most `out * in / n` elements of the weight (none for one part)
    forward and one backward; for a plain replicated input one all-reduce of its gradient, for a sharded one an
    all-gather forward and a reduce-scatter backward.
    """

    lora_neutral = False

    def __init__(self, parts: int | Sequence[int], *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.parts = parts
        self.input_layouts = input_layouts or Replicate()

    def widths(self, out_features: int) -> list[int]:
        """The widths of the projections.

        Raises:
            ValueError: they do not add up to the output of the linear.
        """
        parts = [out_features // self.parts] * self.parts if isinstance(self.parts, int) else list(self.parts)
        if sum(parts) != out_features or min(parts) < 1:
            raise ValueError(f"parts={self.parts} do not make {out_features} output features")
        return parts

    def layout(self, module: Any, ranks: int) -> dict[str, Placement]:
        placements = {"weight": Shard(int(is_conv1d(module))), "bias": Shard(0)}
        return {name: placements[name] for name, _ in module.named_parameters(recurse=False)}

    def attach(self, module: Any, axis: Axis) -> None:
        transposed = is_conv1d(module)
        whole = module.nf if transposed else module.out_features
        module.edges = Edges(axis, "column", self.input_layouts, Shard(-1))
        module.packed = _Packed(tuple(self.widths(whole)), transposed)
        note_local(module, dict.fromkeys(module._parameters, False))
        put_over(module, _OnPackedShards)


@dataclass(frozen=True)
class _Packed:
    widths: tuple[int, ...]
    transposed: bool


class _OnPackedShards:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        axis, packed = self.edges.axis, self.packed
        hidden = enter(hidden, self.edges)
        weight, bias = local(self.weight), self.bias if self.bias is None else local(self.bias)
        weight = weight.t() if packed.transposed else weight
        if len(packed.widths) > 1 and axis.size > 1:
            weight = exchange_rows(weight, packed.widths, axis)
            bias = bias if bias is None else exchange_rows(bias, packed.widths, axis)
        return nn.functional.linear(hidden, weight, bias)


class Conv1DRowwiseParallel(LocalStyle):
    """`RowwiseParallel` for GPT-2's `Conv1D`, whose weight is `(in, out)`.

    Input a rank's share `(B, S, in / n)`; output `(B, S, out)`, or its part of the sequence with
    `output_layouts=Shard(1)`.

    Collectives (the given axis): one all-reduce of the output forward, or with `Shard(1)` a reduce-scatter forward and
    an all-gather backward.
    """

    lora_neutral = False

    def __init__(self, *, output_layouts: Placement | None = None) -> None:
        super().__init__()
        self.output_layouts = output_layouts or Replicate()

    def layout(self, module: Any, ranks: int) -> dict[str, Placement]:
        return {"weight": Shard(0), "bias": Replicate()}

    def attach(self, module: Any, axis: Axis) -> None:
        module.edges = Edges(axis, "row", Shard(-1), self.output_layouts)
        note_local(module, dict.fromkeys(module._parameters, False))
        put_over(module, _OnRowsOfConv1D)


class _OnRowsOfConv1D:
    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        edges = self.edges
        bias = once(local(self.bias), edges.axis)
        out = nn.functional.linear(enter(hidden, edges), local(self.weight).t(), bias)
        return leave(out, edges, out.shape[-1])


class HeadsPerRank(LocalStyle):
    """Tell a module how many heads or features a rank has, where its forward counts on the whole number.

    Args:
        attributes: the module's own integers to divide by the number of ranks.
        config: the same in the module's config, of which it gets a copy of its own.
        by: the module's own integers that another number divides, where neighbouring ranks share one of them.

    Collectives: none.
    """

    def __init__(
        self, attributes: Sequence[str] = (), config: Sequence[str] = (), *, by: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.attributes = tuple(attributes)
        self.config = tuple(config)
        self.by = dict(by or {})

    def divide(self, module: Any, ranks: int) -> None:
        """Set the numbers of one of `ranks` ranks.

        Raises:
            ValueError: one is missing or does not divide.
        """
        if ranks == 1:
            return
        if self.config:
            module.config = copy.copy(module.config)
        own = dict.fromkeys(self.attributes, ranks) | self.by
        for owner, numbers in ((module, own), (getattr(module, "config", None), dict.fromkeys(self.config, ranks))):
            for name, by in numbers.items():
                number = getattr(owner, name, None)
                if not isinstance(number, int) or number % by:
                    raise ValueError(f"{type(module).__name__}'s {name}={number} does not divide over {by} ranks")
                setattr(owner, name, number // by)

    def attach(self, module: nn.Module, axis: Axis) -> None:
        self.divide(module, axis.size)


def exchange_rows(stored: torch.Tensor, widths: Sequence[int], axis: Axis) -> torch.Tensor:
    """From a rank's contiguous rows of a fused weight to its share of each part. Collectives: one all-to-all each way.

    Args:
        stored: `(out / n, ...)` as stored; the result has its shape.
        widths: of the parts.
    """
    order, sends, receives = plan_exchange(widths, axis.size, axis.rank)
    mine = stored.index_select(0, torch.tensor(order, device=stored.device))
    return _Exchange.apply(mine, axis, tuple(receives), tuple(sends))


class _Exchange(torch.autograd.Function):
    """Rows to their ranks; backward the same with what is sent and received exchanged."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, axis: Axis, receives: tuple, sends: tuple) -> torch.Tensor:
        ctx.axis, ctx.receives, ctx.sends = axis, receives, sends
        return axis.all_to_all(rows, receives, sends)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return _Exchange.apply(gradients[0], ctx.axis, ctx.sends, ctx.receives), None, None, None


def plan_exchange(widths: Sequence[int], ranks: int, rank: int) -> tuple[list[int], list[int], list[int]]:
    """Which of its rows a rank sends in which order, how many to each rank, and how many it gets from each.

    Rows go from rank to rank in the order of the whole weight, which is also the order in which they are used.
    """
    rows = sum(widths) // ranks
    needed = [_share(widths, ranks, other) for other in range(ranks)]
    outgoing = [[row - rank * rows for row in of if row // rows == rank] for of in needed]
    receives = [sum(row // rows == other for row in needed[rank]) for other in range(ranks)]
    return list(chain.from_iterable(outgoing)), [len(part) for part in outgoing], receives


def _share(widths: Sequence[int], ranks: int, rank: int) -> list[int]:
    """The rows that a rank uses, in order: its share of each part."""
    return [
        row
        for start, width in zip(accumulate(widths, initial=0), widths, strict=False)
        for row in range(start + rank * width // ranks, start + (rank + 1) * width // ranks)
    ]


def features(module: Any) -> tuple[int, int] | None:
    """`(in, out)` of an `nn.Linear` or a `Conv1D`, None for anything else, such as a linear that quantizes."""
    if isinstance(module, nn.Linear) and _computes_linear(type(module)):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if is_conv1d(module) else None


@cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass computes what `nn.Linear` does, found out on a small one."""
    if kind.forward is nn.Linear.forward:
        return True
    small = kind.__new__(kind)
    nn.Linear.__init__(small, 3, 5)
    hidden = torch.randn(2, 4, 3)
    try:
        with torch.no_grad():
            return torch.allclose(small(hidden), nn.functional.linear(hidden, small.weight, small.bias), atol=1e-6)
    except (RuntimeError, AttributeError, TypeError):
        return False


def is_conv1d(module: Any) -> bool:
    """Whether a module is transformers' `Conv1D`, a linear with a weight `(in, out)`, told by its structure."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return type(module).__name__ == "Conv1D" and own == {"weight", "bias"} and module.weight.dim() == 2
