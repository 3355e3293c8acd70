"""The parallel styles that plans are made of, beside torch's own.

Sequence parallelism shards the residual stream between layers along the sequence; everything before the first layer
(embedding, masks, rotary tables) sees the whole sequence::

    embed          layer 0..N-1                                                     norm + head
    (B, S, D)  ->  split | norm on shard, gather -> attention -> reduce-scatter |   norm on shard, gather
                         | norm on shard, gather -> MLP       -> reduce-scatter |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, SequenceParallel

from am_tp_styles import RowwiseParallelLora, SequenceParallelLora
from am_tp_styles.layout import base_layer


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

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(base_layer(module), nn.Embedding):
            raise TypeError(f"VocabParallelEmbedding is for nn.Embedding, got {type(module).__name__}")
        return super()._apply(module, device_mesh)


class RowwiseParallelNewOutput(RowwiseParallel):
    """`RowwiseParallel` whose output may be modified in place, as some models do: torch's is a view that may not."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: Any
    ) -> Any:
        outputs = RowwiseParallel._prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh)
        return outputs.clone()


class VocabParallelEmbeddingNewOutput(VocabParallelEmbedding, RowwiseParallelNewOutput):
    """`VocabParallelEmbedding` whose output may be modified in place."""


class NormOnShard(SequenceParallelLora):
    """`SequenceParallel` whose gradients of replicated parameters are whole when `backward()` returns.

    With `sequence_dim=2` on a norm over `(B, S, heads, head_dim)` it is the style for norms of a rank's own heads.
    """


class SequenceParallelAllGatherActivation(SequenceParallelLora):
    """Sequence parallelism that gathers the whole sequence after the module: what reads it shares one all-gather.

    Input a shard `(B, S / n, D)`, output `(B, S, D)`; with `use_local_output=False` a replicated DTensor, whose
    gradient, a partial sum, goes back with one reduce-scatter.

    Collectives (the given axis): one all-gather forward; backward one reduce-scatter (none for a local output, whose
    gradient is whole on every rank), and one all-reduce per parameter.
    """

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

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(
            lambda mod, inputs: self._prepare_input_fn(self.sequence_sharding, mod, inputs, device_mesh)
        )
        module.register_forward_hook(
            lambda mod, _inputs, outputs: self._prepare_output_fn(self.use_local_output, mod, outputs, device_mesh)
        )
        return module

    @staticmethod
    def _prepare_input_fn(sequence_sharding: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh) -> Any:
        return tuple(i.to_local() if isinstance(i, DTensor) else i for i in inputs)

    @staticmethod
    def _prepare_output_fn(use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh) -> Any:
        if use_local_output:
            return tuple(outputs)
        return tuple(DTensor.from_local(o, device_mesh, [Replicate()], run_check=False) for o in outputs)


class SequenceShardInput(ParallelStyle):
    """Split a layer's hidden state, replicated until here, along the sequence: the entry of the layer stack.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    shards_sequence = True
    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        replace_hidden(module, lambda hidden: split_sequence(hidden, device_mesh))
        return module


class SequenceShardOutput(ParallelStyle):
    """Split what a module returns, the same on every rank, along the sequence.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda _module, _args, output: on_hidden(output, split_sequence, device_mesh))
        return module


class SequenceGatherOutput(ParallelStyle):
    """Gather the hidden state that a module returns, a shard along the sequence: the exit of the layer stack.

    Collectives (the given axis): one all-gather forward, none backward.
    """

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda _module, _args, output: on_hidden(output, gather_sequence, device_mesh))
        return module


class SequenceGatherInput(ParallelStyle):
    """Gather the hidden state that a block takes; all in the block sees the whole sequence and returns whole gradients.

    Collectives (the given axis): one all-gather forward, none backward.
    """

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        replace_hidden(module, lambda hidden: gather_sequence(hidden, device_mesh))
        return module


class SequenceWholeBlock(ParallelStyle):
    """A block that sees the whole sequence, between layers that see a shard of it: gathered before, split after.

    For what mixes tokens or routes them, and is the same on every rank.

    Collectives (the given axis): one all-gather forward, one backward.
    """

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        SequenceGatherInput()._apply(module, device_mesh)
        return SequenceShardOutput()._apply(module, device_mesh)


class SharedInput(ParallelStyle):
    """One replicated DTensor for all the colwise projections of a block, so that its gradient is summed once.

    Args:
        input_layouts: of the block's hidden state `(B, S, D)`: `Replicate()`, or `Shard(1)` for sequence parallelism.

    Nothing in the block but colwise projections may read the hidden state.

    Collectives (the given axis): for `Replicate()` one all-reduce backward; for `Shard(1)` one all-gather forward and
    one reduce-scatter backward.
    """

    lora_neutral = True

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shared(hidden: torch.Tensor) -> torch.Tensor:
            placed = DTensor.from_local(hidden, device_mesh, [self.input_layouts], run_check=False)
            return placed.redistribute(placements=[Replicate()])

        replace_hidden(module, shared)
        return module


class Several(ParallelStyle):
    """More than one style for one module, applied in order; none of them may shard a linear."""

    lora_neutral = True

    def __init__(self, *styles: ParallelStyle) -> None:
        super().__init__()
        for style in styles:
            if not getattr(style, "lora_neutral", False):
                raise TypeError(
                    f"{type(style).__name__} shards a module of its own and cannot be one of several styles"
                )
        self.styles = tuple(part for style in styles for part in each(style))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for style in self.styles:
            style.src_data_rank = getattr(self, "src_data_rank", 0)
            style._apply(module, device_mesh)
        return module


def each(style: ParallelStyle | None) -> tuple[ParallelStyle, ...]:
    """The styles that one entry of a plan stands for."""
    if style is None:
        return ()
    return style.styles if isinstance(style, Several) else (style,)


def replace_hidden(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the hidden state that a module is called with: its first argument, or `hidden_states`."""

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_hidden(output: Any, change: Callable[[torch.Tensor, DeviceMesh], torch.Tensor], mesh: DeviceMesh) -> Any:
    """Change the hidden state that a module returned: the tensor itself, or the first of a tuple."""
    if isinstance(output, tuple):
        return (change(output[0], mesh), *output[1:])
    return change(output, mesh)


def gather_sequence(hidden: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The whole `(B, S, D)` of every rank's part `(B, S / n, D)`; its gradient must be whole on every rank."""
    gathered = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
    return gathered.to_local(grad_placements=[Replicate()])


def split_sequence(hidden: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part `(B, S / n, D)` of a tensor `(B, S, D)` that every rank of the axis holds.

    Raises:
        ValueError: the sequence does not divide over the axis.
    """
    length = hidden.shape[1]
    if length % mesh.size():
        padded = -(-length // mesh.size()) * mesh.size()
        raise ValueError(f"a sequence of {length} tokens does not divide over {mesh.size()} ranks; pad it to {padded}")
    return (
        DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)]).to_local()
    )
