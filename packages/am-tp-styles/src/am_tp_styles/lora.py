"""Torch's three parallel styles on local tensors, for layers with adapters and without. `layout.py` draws the layouts.

Parameters become DTensors; what a layer computes on is plain. A layer whose forward is not known to be that of
`nn.Linear`, `nn.Embedding` or a layer that treats every token alike, such as one that holds an adapter itself, computes
on DTensors as with torch's styles: what it does between its parameters may need other ranks' shards.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from am_tp_styles._torch_compat import FLATTENS_SHARDED_DIMS, finished
from am_tp_styles.axis import Axis, MeshAxis
from am_tp_styles.compiled_linear import TPLinear, use_tp_linear
from am_tp_styles.dropout import shard_dropout
from am_tp_styles.edges import Edges, mesh_of
from am_tp_styles.gradients import reduce_replicated_gradients
from am_tp_styles.layout import base_layer, has_own_adapter, is_wrapped, layout_of, plan_layout
from am_tp_styles.parameters import distribute
from am_tp_styles.sharded import compute_on_shards
from am_tp_styles.tokens import treats_tokens_alike
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

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        """How each parameter of the layer lies on an axis of so many ranks."""
        return plan_layout(module, _kind(self, module, "column", "features"), ranks)

    def attach(self, module: nn.Module, axis: Axis) -> None:
        """Let the layer compute on its shards, which it holds already."""
        _attach(self, module, axis, _kind(self, module, "column", "features"))

    def computes_on_shards(self, module: nn.Module) -> bool:
        """Whether the layer's forward may run on plain local tensors; if not, it runs on DTensors."""
        return computes_on_shards(module)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.computes_on_shards(module):
            return _distribute_and_attach(self, module, device_mesh)
        return _finish_output(super()._apply(module, device_mesh))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if _is_to_be_sharded(name, module, nn.Linear):
            _shard(module, "column", device_mesh, self.src_data_rank)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if _is_to_be_sharded(name, module, nn.Embedding):
            _shard(module, "features", device_mesh, self.src_data_rank)


class KeyValueColwiseParallel(ColwiseParallelLora):
    """`ColwiseParallel` for the key or value heads of an attention on more ranks than it has of them.

    Neighbouring ranks compute the same head, the one that their query heads read: with two heads on four ranks, ranks 0
    and 1 compute head 0, ranks 2 and 3 head 1. Parameters stay whole, of the model's shape and order; a gradient is
    what all ranks gave to it. For an `nn.Linear` or peft's wrapper of one.

    Args:
        heads: of the whole model; the ranks must be a multiple of them.
        input_layouts: as in `ColwiseParallel`.

    Output: a plain tensor `(B, S, head_dim)`. The attention must be told that a rank has one head.

    Collectives (the given axis): when applied, a broadcast per parameter unless `src_data_rank` is None. Forward and
    backward, those of `ColwiseParallel`, and backward an all-reduce of each parameter's gradient (in a model given to
    `sum_gradients_together`, one for all).

    Raises, when applied, before any collective:
        ValueError: the ranks are no multiple of the heads, the output features do not divide over them, or as
            `ColwiseParallelLora`.
        TypeError: the layer is no linear, its forward is not that of `nn.Linear`, or a subclass of this style prepares
            the input or output in its own way.
    """

    def __init__(self, heads: int, *, input_layouts: Placement | None = None) -> None:
        super().__init__(input_layouts=input_layouts)
        self.heads = heads

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        base = base_layer(module)
        if not isinstance(base, nn.Linear) or not computes_on_shards(module) or _prepares_itself(self, ColwiseParallel):
            raise TypeError(
                f"{type(self).__name__} is for linears with the forward of nn.Linear and leaves their input and output "
                f"as they are; got {type(module).__name__}"
            )
        if self.heads < 1 or ranks % self.heads or base.out_features % self.heads:
            raise ValueError(
                f"{self.heads} heads in {base.out_features} output features cannot be shared by {ranks} ranks; their "
                "number must divide both"
            )
        return plan_layout(module, "heads", ranks)

    def attach(self, module: nn.Module, axis: Axis) -> None:
        _attach(self, module, axis, "heads")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _distribute_and_attach(self, module, device_mesh)


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

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        """How each parameter of the layer lies on an axis of so many ranks."""
        return plan_layout(module, _kind(self, module, "row", "rows"), ranks)

    def attach(self, module: nn.Module, axis: Axis) -> None:
        """Let the layer compute on its shards, which it holds already."""
        linear = isinstance(base_layer(module), nn.Linear)
        self.desired_input_layouts = (Shard(-1) if linear else Replicate(),)
        _attach(self, module, axis, _kind(self, module, "row", "rows"))

    def computes_on_shards(self, module: nn.Module) -> bool:
        """Whether the layer's forward may run on plain local tensors; if not, it runs on DTensors."""
        return computes_on_shards(module)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.computes_on_shards(module):
            return _distribute_and_attach(self, module, device_mesh)
        return _finish_output(super()._apply(module, device_mesh))

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if _is_to_be_sharded(name, module, nn.Linear):
            _shard(module, "row", device_mesh, self.src_data_rank)
            if has_own_adapter(module):
                _keep_adapter_partial(module)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if _is_to_be_sharded(name, module, nn.Embedding):
            _shard(module, "rows", device_mesh, self.src_data_rank)


class SequenceParallelLora(SequenceParallel):
    """`SequenceParallel` for a norm, or for a linear with LoRA adapters or without: every parameter replicated.

    Same arguments and layouts as `SequenceParallel`. Unlike it, parameters are broadcast from `src_data_rank` (torch
    assumes that they agree), `requires_grad` is kept, and gradients are whole when `backward()` returns.

    Collectives (the given axis): when applied, a broadcast per parameter unless `src_data_rank` is None. In backward,
    an all-reduce per trainable parameter.

    Raises, when applied, before any collective:
        ValueError: the layer is sharded already, or an adapter has no sharded form.
    """

    # Whether the layer hands on the whole sequence instead of its part.
    gathers = False

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        """How each parameter of the layer lies on an axis of so many ranks."""
        return plan_layout(module, "sequence", ranks)

    def attach(self, module: nn.Module, axis: Axis) -> None:
        """Let the layer compute on its part of the sequence."""
        _attach(self, module, axis, "sequence")

    def computes_on_shards(self, module: nn.Module) -> bool:
        """Whether the layer's forward may run on plain local tensors; if not, it runs on DTensors."""
        return is_wrapped(module) or treats_tokens_alike(module, self.sequence_sharding[0].dim)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self.computes_on_shards(module):
            return _distribute_and_attach(self, module, device_mesh)
        return _finish_output(super()._apply(module, device_mesh))

    def _replicate_module_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if _is_to_be_sharded(name, module, nn.Module):
            _shard(module, "sequence", device_mesh, self.src_data_rank)
            if not FLATTENS_SHARDED_DIMS:
                use_tp_linear(module)


def computes_on_shards(module: Any) -> bool:
    """Whether a linear, an embedding or peft's wrapper has a known forward, which may run on a rank's shards."""
    known = (nn.Linear.forward, TPLinear.forward, nn.Embedding.forward)
    return is_wrapped(module) or (type(module).forward in known and not has_own_adapter(module))


def _distribute_and_attach(style: Any, module: Any, device_mesh: DeviceMesh) -> nn.Module:
    distribute(module, style.layout(module, device_mesh.size()), device_mesh, style.src_data_rank)
    style.attach(module, MeshAxis(device_mesh))
    return module


def _kind(style: Any, module: Any, linear: str, embedding: str) -> str:
    base = base_layer(module)
    if not isinstance(base, (nn.Linear, nn.Embedding)):
        what = f"the base layer of {type(module).__name__}" if is_wrapped(module) else "the layer"
        raise TypeError(f"{what} is a {type(base).__name__}; {type(style).__name__} shards nn.Linear and nn.Embedding")
    return linear if isinstance(base, nn.Linear) else embedding


def _attach(style: Any, module: Any, axis: Axis, kind: str) -> None:
    edges = _edges(style, axis, kind)
    if is_wrapped(module):
        shard_wrapped(module, edges, layout_of(module, kind), style.src_data_rank)
    else:
        compute_on_shards(module, edges)


def _edges(style: Any, axis: Axis, kind: str) -> Edges:
    """The style's layouts; with the functions of a subclass of torch's styles that prepares them in its own way."""
    if kind == "sequence":
        takes = gives = style.sequence_sharding[0]
        own = _prepares_itself(style, SequenceParallel) and not (style.gathers and style.use_local_output)
        prepare_input = partial(style._prepare_input_fn, style.sequence_sharding)
        prepare_output = partial(style._prepare_output_fn, style.use_local_output)
        gives = Replicate() if style.gathers else gives
    else:
        takes, gives = style.input_layouts[0], style.output_layouts[0]
        torchs = ColwiseParallel if isinstance(style, ColwiseParallel) else RowwiseParallel
        own = _prepares_itself(style, torchs)
        prepare_input = partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts)
        prepare_output = partial(style._prepare_output_fn, style.output_layouts, style.use_local_output)
    if own:
        mesh_of(axis)
    prepare = (prepare_input, prepare_output) if own else None
    return Edges(axis, kind, takes, gives, style.use_local_output, prepare, getattr(style, "heads", 1))


def _prepares_itself(style: Any, torchs: type) -> bool:
    return any(
        getattr(style, name) is not getattr(torchs, name) for name in ("_prepare_input_fn", "_prepare_output_fn")
    )


def _finish_output(module: nn.Module) -> nn.Module:
    """Hand no output on whose collective still runs: compiled layers cannot take it apart in backward."""
    module.register_forward_hook(lambda _module, _args, output: finished(output))
    return module


def _shard(module: Any, kind: str, mesh: DeviceMesh, source: int | None) -> None:
    """For layers that compute on DTensors."""
    distribute(module, plan_layout(module, kind, mesh.size()), mesh, source)
    if has_own_adapter(module):
        for child in module.children():
            shard_dropout(child, MeshAxis(mesh), Replicate())  # sees DTensors, which say how they are sharded
    reduce_replicated_gradients(module)


def _is_to_be_sharded(name: str, module: nn.Module, kind: type) -> bool:
    """Whether a partition function is to shard a module: one that it is called with, by `distribute_module` or by hand.

    `distribute_module` calls it with the layer itself, whose name is empty, then with each module in it by its name;
    what is in a layer (`lora_A`, `lora_B`) was sharded together with it.
    """
    if not name:
        return True
    parameters = list(module.parameters())
    return isinstance(module, kind) and bool(parameters) and not any(isinstance(p, DTensor) for p in parameters)


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
