"""Torch's three parallel styles, for linears and embeddings that carry LoRA adapters. `layout.py` draws the layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from am_tp_styles._torch_compat import FLATTENS_SHARDED_DIMS, finished
from am_tp_styles.classes import put_under
from am_tp_styles.compiled_linear import use_tp_linear
from am_tp_styles.dropout import shard_dropout
from am_tp_styles.gradients import reduce_replicated_gradients
from am_tp_styles.layout import base_layer, has_own_adapter, is_wrapped, plan_layout
from am_tp_styles.parameters import distribute
from am_tp_styles.vocabulary import VocabularyRows
from am_tp_styles.wrapped import shard_wrapped


class ColwiseParallelLora(ColwiseParallel):
    """`ColwiseParallel` for a linear or embedding with LoRA adapters, or without any; an embedding's features.

    Same arguments and layouts as `ColwiseParallel`, on the layer itself or on peft's wrapper. Every gradient is whole
    when `backward()` returns; `requires_grad`, parameter names and ties are kept, `src_data_rank` is honoured.

    Collectives (the given axis): when applied, a scatter or broadcast per parameter unless `src_data_rank` is None.
    Forward, those of `ColwiseParallel`. Backward, those too, and an all-reduce of `lora_A`'s gradient.

    Raises, when applied, before any collective:
        ValueError: a rank would hold nothing, the layer is sharded already, or an adapter has no sharded form.
        TypeError: `lora_A` and `lora_B` are of another structure.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if is_wrapped(module):
            return _apply_to_wrapped(self, module, device_mesh)
        return _finish_output(super()._apply(module, device_mesh))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:  # its lora_A and lora_B are done together with it
            _shard(module, "column", device_mesh, self.src_data_rank)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:
            _shard(module, "features", device_mesh, self.src_data_rank)


class RowwiseParallelLora(RowwiseParallel):
    """`RowwiseParallel` for a linear or embedding with LoRA adapters, or without any; an embedding's vocabulary.

    Same arguments and layouts as `RowwiseParallel`, on the layer itself or on peft's wrapper. Every gradient is whole
    when `backward()` returns; `requires_grad`, parameter names and ties are kept, `src_data_rank` is honoured.

    Each rank applies `lora_B` to its own summand of the adapter's hidden activation, so the sum that the layer needs
    anyway is the only one. (A `lora_B` with a bias, on a linear with its own adapter, costs a sum of `(tokens, r)`.)

    Collectives (the given axis): when applied, a scatter or broadcast per parameter unless `src_data_rank` is None.
    Forward, those of `RowwiseParallel`, and for DoRA one sum of `(out,)`. Backward, those too, and an all-reduce of
    `lora_B`'s gradient and of a DoRA magnitude's.

    Raises, when applied, before any collective:
        ValueError: input features do not divide over the axis, a rank would hold no row of the vocabulary, the layer
            is sharded already, an embedding has `max_norm`, or an adapter has no sharded form.
        TypeError: `lora_A` and `lora_B` are of another structure.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if is_wrapped(module):
            linear = isinstance(base_layer(module), nn.Linear)
            self.desired_input_layouts = (Shard(-1) if linear else Replicate(),)
            return _apply_to_wrapped(self, module, device_mesh)
        return _finish_output(super()._apply(module, device_mesh))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name:  # its lora_A and lora_B are done together with it
            return
        _shard(module, "row", device_mesh, self.src_data_rank)
        if has_own_adapter(module):
            _keep_adapter_partial(module)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:
            _shard(module, "rows", device_mesh, self.src_data_rank)
            if not is_wrapped(module):
                put_under(module, VocabularyRows)


class SequenceParallelLora(SequenceParallel):
    """`SequenceParallel` for a norm, or for a linear with LoRA adapters or without: every parameter replicated.

    Same arguments and layouts as `SequenceParallel`. Unlike it, parameters are broadcast from `src_data_rank` (torch
    assumes that they agree), `requires_grad` is kept, and gradients are whole when `backward()` returns.

    Collectives (the given axis): when applied, a broadcast per parameter unless `src_data_rank` is None. In backward,
    an all-reduce per trainable parameter.

    Raises, when applied, before any collective:
        ValueError: the layer is sharded already, or an adapter has no sharded form.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _finish_output(super()._apply(module, device_mesh))

    def _replicate_module_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:
            _shard(module, "sequence", device_mesh, self.src_data_rank, self.sequence_sharding[0])
            if not FLATTENS_SHARDED_DIMS and not is_wrapped(module):  # within a wrapper everything is local
                use_tp_linear(module)


def _apply_to_wrapped(style: Any, module: Any, device_mesh: DeviceMesh) -> nn.Module:
    """What torch's colwise and rowwise styles do, which know linears and embeddings only."""
    base = base_layer(module)
    if not isinstance(base, (nn.Linear, nn.Embedding)):
        raise TypeError(
            f"the base layer of {type(module).__name__} is a {type(base).__name__}; "
            f"{type(style).__name__} shards adapters on nn.Linear and nn.Embedding"
        )
    linear = isinstance(base, nn.Linear)
    module = distribute_module(
        module,
        device_mesh,
        style._partition_linear_fn if linear else style._partition_embedding_fn,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )
    return _finish_output(module)


def _finish_output(module: nn.Module) -> nn.Module:
    """Hand no output on whose collective still runs: compiled layers cannot take it apart in backward."""
    module.register_forward_hook(lambda _module, _args, output: finished(output))
    return module


def _shard(module: Any, kind: str, mesh: DeviceMesh, source: int | None, sequence: Any = None) -> None:
    if is_wrapped(module):
        shard_wrapped(module, kind, mesh, source, sequence)
        return
    distribute(module, plan_layout(module, kind, mesh.size()), mesh, source)
    if has_own_adapter(module):
        for child in module.children():
            shard_dropout(child, mesh, Replicate())  # sees DTensors, which say how they are sharded
    reduce_replicated_gradients(module)


def _keep_adapter_partial(module: Any) -> None:
    """Let `lora_B` act on each rank's summand of the hidden activation, to be summed together with the base layer's."""
    if module.lora_B.bias is not None:  # would be added once per rank
        module.lora_A.register_forward_hook(_sum_hidden)
        return
    module.lora_B.register_forward_pre_hook(_summands_as_rows)
    module.lora_B.register_forward_hook(_rows_as_summands)


def _sum_hidden(_module: nn.Module, _args: tuple, hidden: Any) -> Any:
    return hidden.redistribute(placements=[Replicate()]) if isinstance(hidden, DTensor) else hidden


def _summands_as_rows(_module: nn.Module, args: tuple) -> tuple:
    """The ranks' summands side by side, as rows of one tall tensor: DTensor then multiplies each where it is."""
    hidden = args[0]
    if not isinstance(hidden, DTensor) or not hidden.placements[0].is_partial():
        return args
    if hidden.dim() < 2:
        return (hidden.redistribute(placements=[Replicate()]), *args[1:])
    rows = DTensor.from_local(hidden.to_local(), hidden.device_mesh, [Shard(0)], run_check=False)
    return (rows, *args[1:])


def _rows_as_summands(_module: nn.Module, args: tuple, output: Any) -> Any:
    if not isinstance(output, DTensor) or args[0].placements != (Shard(0),):
        return output
    return DTensor.from_local(output.to_local(), output.device_mesh, [Partial()], run_check=False)
