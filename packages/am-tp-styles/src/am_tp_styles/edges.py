"""What a layer does with its input before it computes on this rank's shards, and with its output afterwards.

A layer computes on plain local tensors. What torch's styles say in placements becomes one exchange on each side::

    column    whole x -> [ W0 ] -> features 0      row    features 0 -> [ W0 | W1 ] -> summand 0 } sum over the ranks,
              whole x -> [ W1 ] -> features 1             features 1 ->             -> summand 1 } or a part of the sum

A column of fewer heads than ranks (kind `heads`) is whole on every rank, and neighbours compute the same rows::

    whole x -> [ W ] rows of head 0 -> features 0      on ranks 0 and 1 of four, for two heads
    whole x -> [ W ] rows of head 1 -> features 1      on ranks 2 and 3

Layers that read one whole tensor share the sum of its gradient: whoever made the tensor lays its *alias for shares*
beside it (`offer_to_shares`), the same numbers with a gradient that is summed once. A layer that computes its share of
the features reads the alias; everything else reads the tensor, and gives it a whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from am_tp_styles._torch_compat import base_of_view
from am_tp_styles.axis import Axis, MeshAxis
from am_tp_styles.communication import (
    gather,
    gather_for_all,
    gather_for_shares,
    scatter_sum,
    split,
    sum_gradients,
    sum_over_ranks,
)

_ALIAS = "_am_tp_styles_for_shares"
# What a layer of each kind computes on and makes, whatever it takes and hands out.
_WANTS: dict[str, Placement] = {
    "column": Replicate(),
    "heads": Replicate(),
    "row": Shard(-1),
    "rows": Replicate(),
    "features": Replicate(),
}
_MAKES: dict[str, Placement] = {
    "column": Shard(-1),
    "heads": Shard(-1),
    "row": Partial(),
    "rows": Partial(),
    "features": Shard(-1),
}


@dataclass(frozen=True)
class Edges:
    """How one layer's input becomes local, and its output what the next module takes.

    Attributes:
        axis: the tensor-parallel axis.
        kind: `column`, `heads`, `row`, `sequence`, `rows` or `features`, as in `layout.py`.
        takes: how a plain input lies on the axis; a DTensor says so itself.
        gives: how the output is to lie on it.
        local_output: a plain tensor, instead of a DTensor.
        prepare: the input and output functions of a subclass of torch's styles that brings its own, and their options.
        heads: for kind `heads` their number, of which the axis has a multiple of ranks.
    """

    axis: Axis
    kind: str
    takes: Placement
    gives: Placement
    local_output: bool = True
    prepare: tuple[Callable, Callable] | None = None
    heads: int = 1

    @property
    def wants(self) -> Placement:
        return _WANTS.get(self.kind, self.takes)

    @property
    def makes(self) -> Placement:
        return _MAKES.get(self.kind, self.takes)

    @property
    def reads_for_shares(self) -> bool:
        """Whether the layer computes a share of the features, so that its input's gradient is a sum over the ranks."""
        return self.kind in ("column", "heads")

    def rows_of_own_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a whole weight or bias, along dim 0, that belong to the head that this rank computes."""
        length = tensor.shape[0] // self.heads
        return tensor.narrow(0, self.axis.rank * self.heads // self.axis.size * length, length)


def enter(x: torch.Tensor, edges: Edges) -> torch.Tensor:
    """The plain tensor that the layer computes on.

    Collectives: for `column` and `heads` backward one all-reduce of a whole input's gradient, or for a part of the
    sequence one all-gather forward and one reduce-scatter backward; for `row` and a whole input one all-gather
    backward.
    """
    if isinstance(x, DTensor) or edges.prepare:
        return _enter_from_placements(x, edges)
    if edges.reads_for_shares:
        if isinstance(edges.takes, Replicate):
            return for_shares(x, edges.axis)
        if isinstance(edges.takes, Shard):
            return gather_for_shares(x, edges.axis, edges.takes.dim)
    elif edges.takes == edges.wants:
        return x
    elif edges.kind == "row" and isinstance(edges.takes, Replicate):
        return split(x, edges.axis, -1)
    elif edges.kind == "row" and edges.takes == Shard(x.dim() - 1):
        return x
    return _enter_from_placements(x, edges)


def leave(out: torch.Tensor, edges: Edges, whole: int) -> torch.Tensor:
    """What the layer hands out; `whole` is the size of its last dim on all ranks, for `column` and `features`.

    Collectives: for `row` and `rows` one all-reduce, or with `Shard(d)` one reduce-scatter forward and one all-gather
    backward; for `column` and `features` that hand out a whole tensor, one all-gather forward.
    """
    if not edges.local_output or edges.prepare:
        return _leave_to_placements(out, edges, whole)
    made, gives = edges.makes, edges.gives
    if edges.kind == "sequence" and isinstance(gives, Replicate):
        return gather_for_all_readers(edges.axis, edges.makes.dim, out)
    if made == gives or (isinstance(made, Shard) and made.dim == -1 and gives == Shard(out.dim() - 1)):
        return out
    if made.is_partial():
        if isinstance(gives, Replicate):
            return sum_over_ranks(out, edges.axis)
        if isinstance(gives, Shard):
            return scatter_sum(out, edges.axis, gives.dim)
    elif edges.kind in ("column", "features") and isinstance(gives, Replicate):
        return gather(out, edges.axis, -1, whole)
    return _leave_to_placements(out, edges, whole)


def offer_to_shares(tensor: torch.Tensor, axis: Axis) -> None:
    """Let the layers that compute a share of the features from `tensor` sum its gradient once, together.

    Take it back (`withdraw`) when they have read it. Collectives: backward one all-reduce, if any of them did.
    """
    if tensor.requires_grad and torch.is_grad_enabled() and axis.size > 1:
        lay_beside(tensor, sum_gradients(tensor, axis))


def gather_for_all_readers(axis: Axis, dim: int, part: torch.Tensor) -> torch.Tensor:
    """The whole of the ranks' parts, with its alias for shares beside it: one all-gather for both."""
    if torch.compiler.is_compiling():  # which loses the gradient of one of two outputs that are views of each other
        return gather(part, axis, dim)
    whole, alias = gather_for_all(part, axis, dim)
    if alias.requires_grad and axis.size > 1:
        lay_beside(whole, alias)
    return whole


def lay_beside(tensor: torch.Tensor, alias: torch.Tensor) -> None:
    """Lay a tensor's alias for shares beside it."""
    setattr(tensor, _ALIAS, (alias, tensor._version))


def withdraw(tensor: torch.Tensor) -> None:
    """Take the alias away, which would keep a leaf alive."""
    setattr(tensor, _ALIAS, (None, 0))  # not deleted, which a compiler cannot trace


def for_shares(tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A whole tensor, as a layer that computes its share of the features reads it: its gradient will be summed."""
    if axis.size == 1 or not tensor.requires_grad:
        return tensor
    for source in (tensor, base_of_view(tensor)):
        alias, version = getattr(source, _ALIAS, (None, 0))
        if alias is not None and alias.requires_grad and tensor._version == version:
            same = tensor is source or (tensor.shape, tensor.stride()) == (source.shape, source.stride())
            if same and torch.is_grad_enabled():
                return alias
    return sum_gradients(tensor, axis)


def _enter_from_placements(x: torch.Tensor, edges: Edges) -> torch.Tensor:
    mesh = mesh_of(edges.axis)
    gradient = [Partial()] if edges.reads_for_shares else None
    if edges.prepare:
        prepared = edges.prepare[0](None, (x,), mesh)
        prepared = prepared[0] if isinstance(prepared, tuple) else prepared
        return prepared.to_local(grad_placements=gradient) if isinstance(prepared, DTensor) else prepared
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [edges.takes], run_check=False)
    wants = Shard(x.dim() - 1) if edges.wants == Shard(-1) else edges.wants
    if x.placements != (wants,):  # a redistribution to the same would sum a gradient too early
        x = x.redistribute(placements=[wants])
    return x.to_local(grad_placements=gradient)


def _leave_to_placements(out: torch.Tensor, edges: Edges, whole: int) -> torch.Tensor:
    mesh, made = mesh_of(edges.axis), edges.makes
    if isinstance(made, Shard) and made.dim == -1:
        made = Shard(out.dim() - 1)
    size = list(out.shape)
    if made == Shard(out.dim() - 1) and whole % edges.axis.size:
        size[-1] = whole
        stride = torch.empty(size, device="meta").stride()
        out = DTensor.from_local(out, mesh, [made], run_check=False, shape=torch.Size(size), stride=stride)
    else:
        out = DTensor.from_local(out, mesh, [made], run_check=False)
    if edges.prepare:
        return edges.prepare[1](None, out, mesh)
    gives = Shard(out.dim() - 1) if edges.gives == Shard(-1) else edges.gives
    if out.placements != (gives,):
        out = out.redistribute(placements=[gives])
    return out.to_local() if edges.local_output else out


def mesh_of(axis: Axis) -> Any:
    """The mesh that DTensors need.

    Raises:
        NeedsRealRanksError: the axis has none, because one process stands for its ranks.
    """
    if not isinstance(axis, MeshAxis):
        raise NeedsRealRanksError("these layouts need DTensors, and those a mesh of real ranks")
    return axis.mesh


class NeedsRealRanksError(TypeError):
    """A style computes on DTensors, which simulated ranks have none of."""
