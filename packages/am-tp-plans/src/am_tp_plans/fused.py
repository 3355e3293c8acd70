"""Linears that torch's styles do not take: several projections side by side in one weight, and GPT-2's `Conv1D`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.local import handed_out
from am_tp_styles.gradients import reduce_replicated_gradients


class PackedColwiseParallel(ParallelStyle):
    """Colwise for a fused linear: each rank computes its share of every one of the projections in it.

    The weight is stored in plain rows, `Shard(0)` of the whole, so that checkpoints, FSDP2 and optimizers see an
    ordinary DTensor; before use the ranks exchange the rows that belong to another's share. For `nn.Linear`, and with
    `parts=1` the colwise style for `Conv1D`.

    Args:
        parts: the widths of the projections in the output, or how many equal ones there are.
        input_layouts: of the input `(B, S, in)`: `Replicate()`, or `Shard(1)` for sequence parallelism.

    Output: a plain tensor `(B, S, out / n)`, the rank's shares one after the other.

    Collectives (the given axis): an all-to-all of at most `out * in / n` elements of the weight (none for one part)
    forward and one backward; for a plain replicated input one all-reduce of its gradient, for a sharded one an
    all-gather forward and a reduce-scatter backward.
    """

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

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        transposed = is_conv1d(module)
        widths = self.widths(module.weight.shape[int(transposed)])
        distribute(self, module, device_mesh, {"weight": Shard(int(transposed)), "bias": Shard(0)})
        rows = RowExchange(widths, device_mesh) if len(widths) > 1 else None

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            if not isinstance(hidden, DTensor):
                hidden = DTensor.from_local(hidden, device_mesh, [self.input_layouts], run_check=False)
            if hidden.placements != (Replicate(),):  # a redistribution to the same would sum the gradient too early
                hidden = hidden.redistribute(placements=[Replicate()])
            hidden = hidden.to_local(grad_placements=[Partial()])
            weight = _local(module.weight)
            weight, bias = weight.t() if transposed else weight, _local(module.bias)
            if rows:
                weight = rows(weight)
                bias = rows(bias) if bias is not None else None
            return nn.functional.linear(hidden, weight, bias)

        module.forward = forward
        return module


class Conv1DRowwiseParallel(ParallelStyle):
    """`RowwiseParallel` for GPT-2's `Conv1D`, whose weight is `(in, out)`.

    Input a rank's share `(B, S, in / n)`; output `(B, S, out)`, or its part of the sequence with
    `output_layouts=Shard(1)`.

    Collectives (the given axis): one all-reduce of the output forward, or with `Shard(1)` a reduce-scatter forward and
    an all-gather backward.
    """

    def __init__(self, *, output_layouts: Placement | None = None) -> None:
        super().__init__()
        self.output_layouts = output_layouts or Replicate()

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        distribute(self, module, device_mesh, {"weight": Shard(0)})

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            partial = DTensor.from_local(hidden @ _local(module.weight), device_mesh, [Partial()], run_check=False)
            return (partial.redistribute(placements=[self.output_layouts]) + module.bias).to_local()

        module.forward = forward
        return reduce_replicated_gradients(module)


class HeadsPerRank(ParallelStyle):
    """Tell a module how many heads or features a rank has, where its forward counts on the whole number.

    Args:
        attributes: the module's own integers to divide by the number of ranks.
        config: the same in the module's config, of which it gets a copy of its own.

    Collectives: none.
    """

    lora_neutral = True

    def __init__(self, attributes: Sequence[str] = (), config: Sequence[str] = ()) -> None:
        super().__init__()
        self.attributes = tuple(attributes)
        self.config = tuple(config)

    def divide(self, module: Any, ranks: int) -> None:
        """Set the numbers of one of `ranks` ranks.

        Raises:
            ValueError: one is missing or does not divide.
        """
        if self.config:
            module.config = copy.copy(module.config)
        for owner, names in ((module, self.attributes), (getattr(module, "config", None), self.config)):
            for name in names:
                number = getattr(owner, name, None)
                if not isinstance(number, int) or number % ranks:
                    raise ValueError(f"{type(module).__name__}'s {name}={number} does not divide over {ranks} ranks")
                setattr(owner, name, number // ranks)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.divide(module, device_mesh.size())
        return module


class RowExchange:
    """From a rank's contiguous rows of a fused weight to its share of each part, and for the gradient back."""

    def __init__(self, widths: Sequence[int], mesh: DeviceMesh) -> None:
        order, self.sends, self.receives = plan_exchange(widths, mesh.size(), mesh.get_local_rank())
        self.order = torch.tensor(order, device=mesh.device_type)
        self.group = mesh.get_group()

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """Rows `(out / n, ...)` as stored to rows `(out / n, ...)` as used."""
        return _Exchange.apply(stored, self)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stored, rows):
        ctx.rows = rows
        needed = stored.new_empty(stored.shape)
        dist.all_to_all_single(needed, stored[rows.order], rows.receives, rows.sends, group=rows.group)
        return handed_out(needed)

    @staticmethod
    def backward(ctx, *gradients):
        rows, gradient = ctx.rows, gradients[0].contiguous()
        returned = torch.empty_like(gradient)
        dist.all_to_all_single(returned, gradient, rows.sends, rows.receives, group=rows.group)
        return torch.empty_like(gradient).index_copy_(0, rows.order, returned), None


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


def distribute(style: Any, module: Any, mesh: DeviceMesh, layouts: dict[str, Placement]) -> None:
    """Make DTensors of a module's own parameters, replicated where `layouts` says nothing."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        source = None if parameter.is_meta else getattr(style, "src_data_rank", 0)
        placement = layouts.get(name, Replicate())
        sharded = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _local(parameter: torch.Tensor | None) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
