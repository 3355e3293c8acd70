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
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from am_tp_styles._torch_compat import exchanged_tensors
from am_tp_styles.classes import put_over
from am_tp_styles.dropout import shard_dropout
from am_tp_styles.gradients import reduce_replicated_gradients
from am_tp_styles.layout import base_layer, plan_added, plan_layout
from am_tp_styles.parameters import distribute
from am_tp_styles.vocabulary import rows_here


def shard_wrapped(module: Any, kind: str, mesh: DeviceMesh, source: int | None, sequence: Placement) -> None:
    """Shard a wrapper and all its adapters in place; see `plan_layout` for the layouts and what is refused.

    Args:
        module: peft's wrapper of a linear or embedding.
        kind: a key of the table in `layout.py`.
        mesh: the tensor-parallel axis.
        source: the axis's rank whose values everyone gets; None keeps each rank's own.
        sequence: of kind `sequence`, how its input lies on the axis.

    Collectives (the given axis): a scatter or broadcast per parameter unless `source` is None.
    """
    distribute(module, plan_layout(module, kind, mesh.size()), mesh, source)
    put_over(module, _ShardedWrapper)
    module._tp = {"kind": kind, "mesh": mesh, "source": source, "sequence": sequence}
    reduce_replicated_gradients(module)
    _shard_the_rest(module)


class _ShardedWrapper:
    """Over a wrapper's class: DTensor in, local tensors within, DTensor out."""

    def forward(self: Any, x: DTensor, *args: Any, **kwargs: Any) -> DTensor:
        mesh, kind = self._tp["mesh"], self._tp["kind"]
        if getattr(self, "disable_adapters", False) and getattr(self, "merged", False):
            self.unmerge()  # here, where the weights are whole to it; its forward would do it on local ones
        weight: Any = base_layer(self).weight

        def view(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return _local_view(name, tensor, kind)

        if kind == "rows":
            return self._look_up_rows(x, weight, view, *args, **kwargs)
        with exchanged_tensors(self, view):
            # The input of column is whole, and so are ids; what comes back for it is this rank's summand.
            out = super().forward(
                x.to_local(grad_placements=[Partial()] if kind == "column" else None), *args, **kwargs
            )
        if kind == "row":
            return DTensor.from_local(out, mesh, [Partial()], run_check=False)
        if kind == "sequence":
            return DTensor.from_local(out, mesh, [self._tp["sequence"]], run_check=False)
        return _sharded_last(out, mesh, weight.shape[0 if kind == "column" else 1])

    def _look_up_rows(self: Any, x: DTensor, weight: DTensor, view: Any, *args: Any, **kwargs: Any) -> DTensor:
        base = base_layer(self)
        whole_padding = base.padding_idx
        rows, here, padding = rows_here(x.to_local(), weight, whole_padding)
        base.padding_idx = padding
        try:
            with exchanged_tensors(self, view):
                out = super().forward(rows, *args, **kwargs)
        finally:
            base.padding_idx = whole_padding
        out = out.masked_fill(~here.unsqueeze(-1), 0)
        return DTensor.from_local(out, self._tp["mesh"], [Partial()], run_check=False)

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
            if safe_merge and _on_any_rank(broken is not None, self._tp["mesh"]):
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
        distribute(self, plan_added(self, self._tp["kind"]), self._tp["mesh"], self._tp["source"])
        _shard_the_rest(self)


class _NormOverRanks:
    """Over the class of a DoRA magnitude: the norm of weight rows whose columns lie on several ranks."""

    def get_weight_norm(self: Any, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(out,); one all-reduce of that size, and no gradient, as DoRA has it."""
        norm = super().get_weight_norm(weight, *args, **kwargs).detach()
        if isinstance(norm, DTensor):
            return norm.redistribute(placements=[Replicate()])
        return DTensor.from_local(norm.square(), self._tp_mesh, [Partial()], run_check=False).full_tensor().sqrt()


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


def _on_any_rank(here: bool, mesh: DeviceMesh) -> bool:
    flag = torch.tensor(float(here), device=mesh.device_type)
    return bool(DTensor.from_local(flag, mesh, [Partial()], run_check=False).full_tensor())


def _plain(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    return (
        nn.Parameter(tensor.to_local().detach().clone(), requires_grad=False) if isinstance(tensor, DTensor) else tensor
    )


def _shard_the_rest(module: Any) -> None:
    """The parts of the adapters that are no parameters: dropout, and the norm of DoRA."""
    mesh, kind = module._tp["mesh"], module._tp["kind"]
    placement = {"row": Shard(-1), "sequence": module._tp["sequence"]}.get(kind, Replicate())
    for dropout in module.lora_dropout.values():
        shard_dropout(dropout, mesh, placement)
    if kind in ("row", "rows"):
        for magnitude in module.lora_magnitude_vector.values():
            if hasattr(magnitude, "get_weight_norm"):
                put_over(magnitude, _NormOverRanks)
                magnitude._tp_mesh = mesh


def _local_view(name: str, tensor: torch.Tensor, kind: str) -> torch.Tensor:
    """This rank's part of a parameter, with the gradient it owes."""
    if not isinstance(tensor, DTensor):
        raise ValueError(f"{name} came after the layer was sharded, and was not sharded; add adapters through peft")
    if tensor.placements[0].is_shard():
        return tensor.to_local()
    if kind == "row" and name.endswith("bias"):
        # Added once to the sum: on the first rank. The output's gradient is whole on every rank, so its own is, too.
        value = tensor.to_local(grad_placements=[Replicate()])
        return value if tensor.device_mesh.get_local_rank() == 0 else value - value.detach()
    # Whole on every rank, but each sees only a part of the sum: the redistribution is nothing forward, a sum backward.
    return tensor.redistribute(placements=tensor.placements).to_local(grad_placements=[Partial()])


def _sharded_last(out: torch.Tensor, mesh: DeviceMesh, size: int) -> DTensor:
    placement = [Shard(out.dim() - 1)]
    if size % mesh.size() == 0:
        return DTensor.from_local(out, mesh, placement, run_check=False)
    whole = torch.empty((*out.shape[:-1], size), device="meta")
    return DTensor.from_local(out, mesh, placement, run_check=False, shape=whole.shape, stride=whole.stride())
