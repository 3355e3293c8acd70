"""The parallel styles that plans are made of, beside torch's own.

Sequence parallelism shards the residual stream between layers along the sequence; everything before the first layer
(embedding, masks, rotary tables) sees the whole sequence::

    embed          layer 0..N-1                                                     norm + head
    (B, S, D)  ->  split | norm on shard, gather -> attention -> reduce-scatter |   norm on shard, gather
                         | norm on shard, gather -> MLP       -> reduce-scatter |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from am_tp_styles import SequenceParallelLora


class VocabParallelEmbedding(RowwiseParallel):
    """An embedding whose rows, the vocabulary, are sharded: ids replicated, output replicated unless told otherwise.

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
        if not isinstance(module, nn.Embedding):
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


class SequenceShardInput(ParallelStyle):
    """Split a layer's hidden state, replicated until here, along the sequence: the entry of the layer stack.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    shards_sequence = True
    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def split(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if args:
                return (split_sequence(args[0], device_mesh), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": split_sequence(kwargs["hidden_states"], device_mesh)}

        module.register_forward_pre_hook(split, with_kwargs=True)
        return module


class SequenceShardOutput(ParallelStyle):
    """Split what a module returns, the same on every rank, along the sequence.

    Collectives (the given axis): none forward, one all-gather backward.
    """

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_hook(lambda _module, _args, output: split_sequence(output, device_mesh))
        return module


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
