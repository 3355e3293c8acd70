"""Modules that mix tokens by recurrence or convolution: each rank runs them on whole sequences, of some of the rows.

    rank 0: rows a b, tokens 0 1 6 7        rank 0: row a, tokens 0 ... 7
    rank 1: rows a b, tokens 2 3 4 5   <->  rank 1: row b, tokens 0 ... 7

That takes as much memory as a part of every sequence, and nothing is computed twice. Where the rows do not divide over
the ranks, each runs all of them and keeps its tokens: the results and all gradients are the same, but the work and the
memory of these modules are not divided.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from am_moe._torch_compat import all_gather, reduce_scatter
from am_moe.context_parallel.batch import in_order, shard_sequence
from am_moe.context_parallel.nested import map_tensors


@dataclass(frozen=True)
class Running:
    """The forward that runs: its rows, its tokens on this rank, and whether any rank's are padding."""

    rows: int
    tokens: int
    padded: bool


def run_on_whole_sequences(
    module: nn.Module, name: str, mesh: DeviceMesh, running: Callable[[], Running | None]
) -> None:
    """Hook a module so that it sees whole sequences and returns this rank's tokens, in place.

    Args:
        module: called with a hidden state `(B, S, ...)` and what else goes by tokens; returns `(B, S, ...)`, alone or
            first. Tensors of other shapes behind it, such as a last state, become None: they are of other rows.
        name: for errors.
        mesh: the context axis, or both.
        running: the forward that runs; None in a recomputation.

    Collectives: for each argument and result by tokens one all-to-all over each axis where the rows divide over the
        ranks; else one all-gather for each argument. The backward has as many, with a reduce-scatter for an all-gather.
        With padding, and in a recomputation, one all-reduce of a flag over each axis.
    """
    hooks = _WholeSequences(module, name, mesh, running)
    module.register_forward_pre_hook(hooks.before, with_kwargs=True)
    # Before those of a tensor axis, which came first going in.
    module.register_forward_hook(hooks.after, prepend=True, always_call=True)


class _WholeSequences:
    def __init__(self, module: nn.Module, name: str, mesh: DeviceMesh, running: Callable[[], Running | None]) -> None:
        self.name, self.mesh, self.running = name, mesh, running
        self.parameters = tuple(inspect.signature(module.forward).parameters)
        self.sizes: list[tuple[int, int]] = []  # rows and tokens of the calls that have not returned

    def __deepcopy__(self, memo: dict[int, Any]) -> _WholeSequences:
        """A copy of the model shares it: groups cannot be copied."""
        return self

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        hidden = next(x for x in given.values() if isinstance(x, torch.Tensor) and x.dim() > 2)
        rows, tokens = hidden.shape[:2]
        now = self.running()
        if now is not None and (now.rows, now.tokens) != (rows, tokens):
            raise ValueError(
                f"{self.name} ({type(module).__name__}) mixes neighbours not of the {now.rows} x {now.tokens} tokens "
                f"of this rank, but of {rows} x {tokens}, which context parallelism does not cut"
            )
        if now is None or now.padded:
            given |= self._masks(given, hidden)
        self.sizes.append((rows, tokens))
        whole = {key: map_tensors(x, self._whole) for key, x in given.items()}
        return tuple(whole.pop(key) for key in self.parameters[: len(args)]), whole

    def _masks(self, given: dict[str, Any], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """A model leaves out the mask of tokens that have no padding: a rank has one if any rank has."""
        masks = {name: value for name, value in given.items() if "mask" in name}
        names = [name for name, value in masks.items() if value is None or _by_tokens(value, hidden)]
        if not names:
            return {}
        has = torch.tensor([_mask_kind(given[name]) for name in names], dtype=torch.int32, device=hidden.device)
        for axis in range(self.mesh.ndim):
            dist.all_reduce(has, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
        if max(kinds := has.tolist()) > 1:  # on every rank alike
            raise ValueError(
                f"{self.name} is given a padding mask of floating-point numbers, which may be added or multiplied; "
                "context parallelism does not know what it means for tokens without padding"
            )
        shape = hidden.shape[:2]
        # Of one dtype, whatever a model makes of it: it is multiplied with, or compared.
        return {
            name: hidden.new_ones(shape, dtype=torch.int64) if given[name] is None else given[name].long()
            for name, any_has in zip(names, kinds, strict=True)
            if any_has
        }

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not self.sizes:  # `before` raised
            return output
        result = map_tensors(output, self._mine)
        rows, tokens = self.sizes.pop()
        first = result[0] if isinstance(result, tuple) else result
        if output is not None and first is None:  # None too where the module raised
            raise ValueError(
                f"{self.name} ({type(module).__name__}) mixes tokens, but does not return {rows} x {tokens} of them; "
                "context parallelism cannot cut what it returns"
            )
        return result

    def _whole(self, given: torch.Tensor) -> torch.Tensor:
        rows, tokens = self.sizes[-1]
        if given.dim() > 1 and given.shape[1] == tokens and given.shape[0] in (1, rows):
            divided = given.shape[0] == rows and self._divides(rows)
            spread = _Spread.apply if divided else _Gather.apply
            flag = given.dtype is torch.bool
            for axis in reversed(range(self.mesh.ndim)):
                given = spread(given.byte() if flag else given, self.mesh.get_group(axis))
            given = in_order(given, self.mesh.size())
            return given.bool() if flag else given
        if tokens in given.shape and given.dim() > 1:
            raise ValueError(
                f"{self.name} is given a tensor of shape {tuple(given.shape)}, which is not by rows and tokens; "
                "context parallelism cannot make it whole"
            )
        return given

    def _mine(self, returned: torch.Tensor) -> torch.Tensor | None:
        rows, tokens = self.sizes[-1]
        ranks = self.mesh.size()
        divided = self._divides(rows)
        if tuple(returned.shape[:2]) != (rows // ranks if divided else rows, tokens * ranks):
            return None
        if not divided:
            return shard_sequence(returned, self.mesh)
        chunks = returned.chunk(2 * ranks, dim=1)
        returned = torch.cat([chunk for rank in range(ranks) for chunk in (chunks[rank], chunks[-1 - rank])], dim=1)
        for axis in range(self.mesh.ndim):
            returned = _Collect.apply(returned, self.mesh.get_group(axis))
        return returned

    def _divides(self, rows: int) -> bool:
        return rows % self.mesh.size() == 0


def _mask_kind(mask: torch.Tensor | None) -> int:
    """0 for none, 1 for flags, 2 for numbers."""
    return 0 if mask is None else 1 + mask.is_floating_point()


def _by_tokens(value: Any, hidden: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == hidden.shape[:2]


class _Spread(torch.autograd.Function):
    """`(B, S, ...)` of each rank's tokens to `(B / A, A S, ...)`: the tokens of all ranks, one after the other."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ranks = dist.get_world_size(group)
        return _exchanged(x.unflatten(0, (ranks, -1)), group).movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, *gradients):
        return _Collect.apply(gradients[0], ctx.group), None


class _Collect(torch.autograd.Function):
    """The inverse of `_Spread`."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ranks = dist.get_world_size(group)
        return _exchanged(x.unflatten(1, (ranks, -1)).movedim(1, 0), group).flatten(0, 1)

    @staticmethod
    def backward(ctx, *gradients):
        return _Spread.apply(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """`(B, S, ...)` of each rank's tokens to `(B, A S, ...)`; what every rank's use of them gives is summed."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ranks = dist.get_world_size(group)
        parts = x.new_empty(ranks, *x.shape)
        all_gather(parts.flatten(0, 1), x.contiguous(), group=group)
        return parts.movedim(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, *gradients):
        ranks = dist.get_world_size(ctx.group)
        parts = gradients[0].unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
        mine = torch.empty_like(parts[0])
        reduce_scatter(mine, parts.flatten(0, 1), group=ctx.group)
        return mine, None


def gather_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`(B, S, ...)` of each rank's tokens to `(B, A S, ...)`, rank after rank; gradients are summed over the ranks."""
    return _Gather.apply(x, group)


def _exchanged(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Part i of each rank to rank i, `(A, ...)`."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
