"""The parallel styles that plans are made of, beside torch's own.

Sequence parallelism shards the residual stream between layers along the sequence; everything before the first layer
(embedding, masks, rotary tables) sees the whole sequence::

    embed          layer 0..N-1                                                     norm + head
    (B, S, D)  ->  split | norm on shard, gather -> attention -> reduce-scatter |   norm on shard, gather
                         | norm on shard, gather -> MLP       -> reduce-scatter |
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel

from am_tp_plans.styles.around import change_argument, change_input, change_output, change_output_like_input
from am_tp_plans.styles.fused import PackedColwiseParallel
from am_tp_styles import RowwiseParallelLora, SequenceParallelLora, translate_to_lora
from am_tp_styles.axis import Axis, MeshAxis
from am_tp_styles.communication import gather, split
from am_tp_styles.edges import gather_for_all_readers, mesh_of, offer_to_shares, withdraw
from am_tp_styles.layout import base_layer
from am_tp_styles.style import LocalStyle


class VocabParallelEmbedding(RowwiseParallelLora):
    """An embedding whose rows, the vocabulary, are sharded: ids replicated, output replicated unless told otherwise.

    With adapters or without, beside compiled layers or not.

    It keeps nothing on the module between calls, so a module may be called again before its backward, and it works
    where `padding_idx` lies on another rank's shard.

    Collectives (the given axis): one all-reduce of the output forward; for `output_layouts=Shard(1)` one
    reduce-scatter.
    """

    def __init__(self, *, input_layouts=None, output_layouts=None, use_local_output: bool = True) -> None:
        super().__init__(
            input_layouts=input_layouts or Replicate(),
            output_layouts=output_layouts or Replicate(),
            use_local_output=use_local_output,
        )

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        if not isinstance(base_layer(module), nn.Embedding):
            raise TypeError(f"VocabParallelEmbedding is for nn.Embedding, got {type(module).__name__}")
        return super().layout(module, ranks)


class NormOnShard(SequenceParallelLora):
    """`SequenceParallel` whose gradients of replicated parameters are whole when `backward()` returns.

    With `sequence_dim=2` on a norm over `(B, S, heads, head_dim)` it is the style for norms of a rank's own heads.
    """


class SequenceParallelAllGatherActivation(SequenceParallelLora):
    """Sequence parallelism that gathers the whole sequence after the module: what reads it shares one all-gather.

    Input a shard `(B, S / n, D)`, output `(B, S, D)`. What colwise layers read of a plain output gets its gradient, a
    sum of shares, back with one reduce-scatter for all of them; what anything else reads, its whole gradient as it is.
    With `use_local_output=False` the output is a replicated DTensor whose gradient is a partial sum.

    Collectives (the given axis): one all-gather forward; backward one reduce-scatter, and one all-reduce per parameter
    (with `apply_plan`, one for all).
    """

    gathers = True

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Any:
        if isinstance(outputs, DTensor):
            outputs = outputs.redistribute(placements=[Replicate()])
            return outputs.to_local() if use_local_output else outputs
        return outputs


class RotaryEmbedParallel(SequenceParallel):
    """Rotary tables of the whole sequence, from a hidden state that is a shard of it and whole position ids.

    A table depends on positions alone, so nothing is communicated or checked. Input `(x, position_ids)`, tensors or
    DTensors; output the module's tuple, of plain tensors or, with `use_local_output=False`, of replicated DTensors.

    Collectives: none.
    """

    lora_neutral = True

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        return {}

    def attach(self, module: nn.Module, axis: Axis) -> None:
        module.register_forward_pre_hook(_local_inputs)
        if not self.use_local_output:
            module.register_forward_hook(partial(_replicated_outputs, mesh_of(axis)))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.attach(module, MeshAxis(device_mesh))
        return module


def _local_inputs(_module: nn.Module, inputs: tuple) -> tuple:
    return tuple(i.to_local() if isinstance(i, DTensor) else i for i in inputs)


def _replicated_outputs(mesh: DeviceMesh, _module: nn.Module, _inputs: tuple, outputs: tuple) -> tuple:
    return tuple(DTensor.from_local(o, mesh, [Replicate()], run_check=False) for o in outputs)


class SequenceShardInput(LocalStyle):
    """Split a layer's hidden state, replicated until here, along the sequence: the entry of the layer stack.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    shards_sequence = True

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_input(module, partial(split_sequence, axis))


class SequenceShardArgument(LocalStyle):
    """Split another argument of a layer, the same on every rank, along the sequence: Gemma 4's inputs per layer.

    Args:
        name: of the argument of the layer's forward, a tensor `(B, S, ...)` or None.
        position: among its arguments; the hidden state has 0.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    def __init__(self, name: str, position: int) -> None:
        super().__init__()
        self.name, self.position = name, position

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_argument(module, self.name, self.position, partial(split_sequence, axis))


class SequenceShardOutput(LocalStyle):
    """Split what a module returns, the same on every rank, along the sequence.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_output(module, partial(split_sequence, axis))


class SequenceGatherOutput(LocalStyle):
    """Gather the hidden state that a module returns, a shard along the sequence: the exit of the layer stack.

    Collectives (the given axis): one all-gather forward, none backward.
    """

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_output(module, partial(gather_sequence, axis))


class SequenceGatherInput(LocalStyle):
    """Gather the hidden state that a block takes; all in the block sees the whole sequence and returns whole gradients.

    Collectives (the given axis): one all-gather forward, none backward.
    """

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_input(module, partial(gather_sequence, axis))


class SequenceWholeBlock(LocalStyle):
    """A block that sees the whole sequence, between layers that see a shard of it: gathered before, split after.

    For what mixes tokens or routes them, and is the same on every rank. It may return its rows one below the other,
    `(B * S, D)`, as a mixture of experts does; a rank's part of them is `(B * S / n, D)`.

    Collectives (the given axis): one all-gather forward, one backward.
    """

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_input(module, partial(gather_sequence, axis))
        change_output_like_input(module, partial(_split_rows, axis))


def _split_rows(axis: Axis, output: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    if output.dim() != 2:
        return split_sequence(axis, output)
    return split_sequence(axis, output.reshape(*hidden.shape[:2], -1)).flatten(0, 1)


class SharedInput(LocalStyle):
    """Let all colwise projections of a block sum the gradient of their input once, together.

    What else in the block reads the hidden state gives it a whole gradient, as it is.

    Args:
        input_layouts: of the block's hidden state `(B, S, D)`: `Replicate()`, or `Shard(1)` for sequence parallelism.

    Collectives (the given axis): for `Replicate()` one all-reduce backward; for `Shard(1)` one all-gather forward and
    one reduce-scatter backward.
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()

    def attach(self, module: nn.Module, axis: Axis) -> None:
        if isinstance(self.input_layouts, Shard):
            change_input(module, partial(gather_for_all_readers, axis, self.input_layouts.dim))
        else:
            change_input(module, partial(_offered, axis), withdraw)


def _offered(axis: Axis, hidden: torch.Tensor) -> torch.Tensor:
    offer_to_shares(hidden, axis)
    return hidden


class Several(LocalStyle):
    """More than one style for one module, applied in order; none of them may shard a linear."""

    def __init__(self, *styles: ParallelStyle) -> None:
        super().__init__()
        for style in styles:
            if not getattr(style, "lora_neutral", False):
                raise TypeError(
                    f"{type(style).__name__} shards a module of its own and cannot be one of several styles"
                )
        self.styles = tuple(part for style in styles for part in each(style))

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        return {name: placement for style in self.styles for name, placement in style.layout(module, ranks).items()}

    def attach(self, module: nn.Module, axis: Axis) -> None:
        for style in self.styles:
            style.attach(module, axis)


def each(style: ParallelStyle | None) -> tuple[ParallelStyle, ...]:
    """The styles that one entry of a plan stands for."""
    if style is None:
        return ()
    return style.styles if isinstance(style, Several) else (style,)


def describe(style: ParallelStyle | None) -> str:
    """A style's class and settings."""
    if style is None:
        return ""
    settings = {name: sorted(v) if isinstance(v, (set, frozenset)) else v for name, v in sorted(vars(style).items())}
    parts = tuple(map(describe, settings.pop("styles", ())))
    return f"{type(style).__module__}.{type(style).__qualname__}{settings}{parts}"


def local_form(style: ParallelStyle) -> ParallelStyle:
    """A style of torch's that shards a module, in the form that computes on plain local tensors; others as they are."""
    sharding = isinstance(style, (ColwiseParallel, RowwiseParallel, SequenceParallel))
    return cast(ParallelStyle, translate_to_lora(style)) if sharding else style


def shards_sequence(style: ParallelStyle | None) -> bool:
    """Whether a stack's sequence is sharded from where this entry of a plan is."""
    return any(getattr(part, "shards_sequence", False) for part in each(style))


def is_open_colwise(style: ParallelStyle) -> bool:
    """Whether a style leaves each rank with its own features."""
    return isinstance(style, PackedColwiseParallel) or (
        isinstance(style, ColwiseParallel) and style.output_layouts[0] != Replicate()
    )


def gather_sequence(axis: Axis, hidden: torch.Tensor) -> torch.Tensor:
    """The whole `(B, S, D)` of every rank's part `(B, S / n, D)`; its gradient must be whole on every rank."""
    return gather(hidden, axis, 1)


def split_sequence(axis: Axis, hidden: torch.Tensor) -> torch.Tensor:
    """This rank's part `(B, S / n, D)` of a tensor `(B, S, D)` that every rank of the axis holds.

    Raises:
        ValueError: the sequence does not divide over the axis.
    """
    length = hidden.shape[1]
    if length % axis.size:
        padded = -(-length // axis.size) * axis.size
        raise ValueError(f"a sequence of {length} tokens does not divide over {axis.size} ranks; pad it to {padded}")
    return split(hidden, axis, 1)
