"""Adapter layers in peft's form, on this rank's shards.

The wrapper's own forward runs on plain local tensors, whatever it does there (several adapters, dropout, DoRA, a batch
of mixed adapters), because every step of it is linear in the activation. Column and row on two ranks::

    column   x ------------------> [ W0 | A,B0 ] -> y0        row   x0 -> [ W0 | A0,B ] -> part 0 \\
             (whole, on both) ---> [ W1 | A,B1 ] -> y1              x1 -> [ W1 | A1,B ] -> part 1 / sum = y

The adapter's output joins the base layer's before that one's own sum, so no activation is communicated for it. In
backward, the gradients of the input from base and adapters are added before the base layer's own sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from am_tp_styles._torch_compat import exchanged_tensors
from am_tp_styles.axis import MeshAxis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import once
from am_tp_styles.dropout import shard_dropout
from am_tp_styles.edges import Edges, enter, leave, mesh_of
from am_tp_styles.layer_parameters import note_local
from am_tp_styles.layout import base_layer, has_rows_of_features, plan_added
from am_tp_styles.local_parameters import local
from am_tp_styles.parameters import distribute
from am_tp_styles.vocabulary import rows_here


def shard_wrapped(module: Any, edges: Edges, layout: dict[str, Placement], source: int | None) -> None:
    """Let a wrapper, whose parameters are sharded already, compute on them with all its adapters.

    Args:
        module: peft's wrapper of a linear or embedding.
        edges: of the layer.
        layout: from `plan_layout`.
        source: the axis's rank whose values later adapters get; None keeps each rank's own.
    """
    module.edges, module.sharded_as, module.source = edges, dict(layout), source
    put_over(module, _ShardedWrapper)
    _attach_the_rest(module)


class _ShardedWrapper:
    """Over a wrapper's class: its own forward on local tensors, between the layer's two exchanges."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        edges: Edges = self.edges
        if getattr(self, "disable_adapters", False) and getattr(self, "merged", False):
            self.unmerge()  # here, where the weights are whole to it; its forward would do it on local ones
        base: Any = base_layer(self)
        width = base.out_features if isinstance(base, nn.Linear) else base.embedding_dim
        x = enter(x, edges)
        with exchanged_tensors(self, partial(_local_view, self)):
            out = (
                self._look_up_rows(x, *args, **kwargs) if edges.kind == "rows" else super().forward(x, *args, **kwargs)
            )
        return leave(out, edges, width)

    def _look_up_rows(self: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = base_layer(self)
        whole_padding = base.padding_idx
        held, axis = base.weight.shape[0], self.edges.axis
        rows, here, padding = rows_here(ids, held, base.num_embeddings, axis, whole_padding)
        base.padding_idx = padding
        try:
            out = super().forward(rows, *args, **kwargs)
        finally:
            base.padding_idx = whole_padding
        return out.masked_fill(~here.unsqueeze(-1), 0)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's; with `safe_merge` every rank refuses when one finds a NaN. Collectives: then a sum of one flag."""
        before = list(self.merged_adapters)
        with _merged_locally(self):
            broken = None
            try:
                super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            except ValueError as error:
                if not safe_merge:
                    raise
                broken = error
            if safe_merge and _on_any_rank(broken is not None, self):
                self.merged_adapters = before
                raise broken or ValueError("NaNs detected in the merged weights of another rank")

    def unmerge(self: Any) -> None:
        with _merged_locally(self):
            super().unmerge()

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """peft adds an adapter: laid out like the others, with the source rank's values.

        Raises:
            ValueError: its initialisation reads the base weight, of which each rank has a part; before any collective.
        """
        _check_whole_over_other_axes(self)
        config = kwargs.get("config")
        options = {**(vars(config) if config is not None else {}), **kwargs}
        start = options.get("init_lora_weights", True)
        if options.get("use_dora") or (isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal")):
            raise ValueError(
                f"adapter {adapter_name!r} starts from the whole base weight (use_dora={options.get('use_dora')}, "
                f"init_lora_weights={start!r}), which is sharded; add it before the layer is sharded"
            )
        super().update_layer(adapter_name, *args, **kwargs)
        added = plan_added(self, self.edges.kind)
        distribute(self, added, mesh_of(self.edges.axis), self.source)
        self.sharded_as |= added
        _attach_the_rest(self)


class _NormOverRanks:
    """Over the class of a DoRA magnitude: the norm of weight rows whose columns lie on several ranks."""

    def get_weight_norm(self: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(out,); one all-reduce of that size, and no gradient, as DoRA has it."""
        norm = super().get_weight_norm(weight, *args, **kwargs).detach()
        if isinstance(norm, DTensor):
            return norm.redistribute(placements=[Replicate()])
        return self.axis.all_reduce(norm.square()).sqrt()


@contextmanager
def _merged_locally(module: Any) -> Iterator[None]:
    """Let peft assign to `weight.data`, which a DTensor takes no notice of: on local tensors, then copied back."""
    _check_whole_over_other_axes(module)
    sharded = {name: p for name, p in base_layer(module).named_parameters() if isinstance(p, DTensor)}
    with torch.no_grad(), exchanged_tensors(module, _plain):
        yield
        merged = {name: base_layer(module).get_parameter(name) for name in sharded}
    for name, value in merged.items():
        sharded[name].to_local().detach().copy_(value.detach())


def _check_whole_over_other_axes(module: Any) -> None:
    for name, parameter in base_layer(module).named_parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.ndim > 1:
            raise ValueError(
                f"{name} of {type(module).__name__} is sharded over {parameter.device_mesh.mesh_dim_names}, not over "
                "the tensor-parallel axis alone; call unshard() of the FSDP module first"
            )


def _on_any_rank(here: bool, module: Any) -> bool:
    flag = torch.tensor(float(here), device=base_layer(module).weight.device)
    return bool(module.edges.axis.all_reduce(flag, "max"))


def _plain(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (
        nn.Parameter(tensor.to_local().detach().clone(), requires_grad=False) if isinstance(tensor, DTensor) else tensor
    )


def _attach_the_rest(module: Any) -> None:
    """What of the adapters is no parameter, dropout and the norm of DoRA; and whose gradients are summed."""
    edges = module.edges
    placement = {"row": Shard(-1), "sequence": edges.takes}.get(edges.kind, Replicate())
    for dropout in module.lora_dropout.values():
        shard_dropout(dropout, edges.axis, placement)
    if edges.kind in ("row", "rows"):
        for magnitude in module.lora_magnitude_vector.values():
            if hasattr(magnitude, "get_weight_norm"):
                put_over(magnitude, _NormOverRanks)
                magnitude.axis = edges.axis
    for name in module.sharded_as:
        owner, _, leaf = name.rpartition(".")
        note_local(module.get_submodule(owner), {leaf: _is_summed(module, name)})


def _local_view(module: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, with the gradient it owes."""
    edges = module.edges
    if isinstance(tensor, nn.Parameter) and not isinstance(tensor, DTensor) and isinstance(edges.axis, MeshAxis):
        raise ValueError(f"{name} came after the layer was sharded, and was not sharded; add adapters through peft")
    if name not in module.sharded_as:
        return tensor
    part = local(tensor, edges.axis if _is_summed(module, name) else None)
    if edges.kind == "heads" and has_rows_of_features(module, name):
        return edges.rows_of_own_head(part)
    return once(part, edges.axis) if edges.kind == "row" and name.endswith("bias") else part


def _is_summed(module: Any, name: str) -> bool:
    """Whether a parameter is whole on every rank, but each sees only a part of the sum."""
    added_once = module.edges.kind == "row" and name.endswith("bias")
    return module.sharded_as[name].is_replicate() and not added_once
