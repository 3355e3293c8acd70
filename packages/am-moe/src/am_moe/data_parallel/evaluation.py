# A copy of packages/am-fsdp/src/am_fsdp/layout/evaluation.py, made by `nox -s copies`: edit that one.
"""Units have their shards again after a forward that records no graph.

FSDP2 keeps a unit with `reshard_after_forward=False` gathered until its backward. After a forward that has none, such
as a metric or a validation loss, `model.parameters()` would be other objects than those that the optimizer holds:

    forward, backward          every unit is sharded, gradients are on the shards
    forward without a graph    FSDP2 leaves some units gathered; the hooks of this file shard them again
    clip, optimizer step       on the shards

A forward that records a graph leaves its units gathered, for the backward that may come. If none comes, the unit's next
forward gathers again what was stepped since and refuses what was edited; am-fsdp's `clip_grad_norm_` refuses the
gathered parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from am_moe._torch_compat import end_forward, is_unsharded, reduce_as_asked, unit_key, unit_parameters, writes


def reshard_after_evaluation(model: nn.Module) -> None:
    """Make every FSDP2 unit of a model shard itself after a forward without gradients, in place.

    A unit that was gathered before the forward stays so: by `FSDPModule.unshard`, or for a graph that still waits for
    its backward.

    Args:
        model: after the last `fully_shard`.

    Collectives: none of its own. The first forward under `torch.inference_mode` gathers each unit once outside of that
        mode, because the next training step could not use what FSDP2 would allocate inside.

    Raises:
        ValueError: from the forward of a unit: a parameter was edited, frozen or unfrozen while it was gathered, which
            its shards do not know of.
    """
    units: dict[int, _Unit] = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            units.setdefault(unit_key(module), _Unit(name)).modules.append(module)
    for unit in units.values():
        below = {id(module) for module in unit.modules[0].modules()}
        unit.within = [u for u in units.values() if id(u.modules[0]) in below]
    for unit in units.values():
        unit.is_root = not any(unit in other.within for other in units.values() if other is not unit)
        for module in unit.modules:
            module.register_forward_pre_hook(unit.before, prepend=True)
            module.register_forward_hook(unit.after)


def outside_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep `torch.compile` out of a hook, as FSDP2 does with its own."""

    @functools.wraps(hook)
    def run(*arguments: Any) -> None:
        return (torch.compiler.disable(hook) if torch.compiler.is_compiling() else hook)(*arguments)

    return run


@dataclasses.dataclass(eq=False)
class _Unit:
    name: str
    modules: list[Any] = dataclasses.field(default_factory=list)
    within: list[_Unit] = dataclasses.field(default_factory=list)  # this one and the units inside it
    is_root: bool = False
    root_runs: bool = False  # the forward goes through the root, which sees its end
    to_run: set[nn.Module] = dataclasses.field(default_factory=set)  # modules that the forward has yet to run
    was_whole: bool = False  # before that forward
    seen: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # writes to shards and to gathered parameters

    @outside_graphs
    def before(self, module: nn.Module, _arguments: Any) -> None:
        if self.is_root:
            for unit in self.within:
                unit.root_runs = True
                unit.to_run.clear()  # an exception may have ended the forward before
        if self.to_run and len(self.to_run) < len(self.modules):
            return  # another module of the unit has begun
        self.to_run = set(self.modules)
        self.was_whole = is_unsharded(self.modules[0])
        if self.was_whole:
            self._follow_changes()
            return
        reduce_as_asked(self.modules[0])
        if torch.is_inference_mode_enabled():
            for unit in self.within:
                unit._gather_outside_inference_mode()

    @outside_graphs
    def after(self, module: nn.Module, _arguments: Any, output: Any) -> None:
        self.to_run.discard(module)
        if not torch.is_grad_enabled() or (self.is_root and not _may_have_graph(output)):
            for unit in self.within if self.is_root or not (self.to_run and self.root_runs) else ():
                if not unit.was_whole:
                    end_forward(unit.modules[0])
                    unit.to_run.clear()
        elif is_unsharded(self.modules[0]):
            self.seen = self._writes()
        if self.is_root:
            for unit in self.within:
                unit.root_runs = False

    def _writes(self) -> list[tuple[int, int]]:
        managed = unit_parameters(self.modules[0])
        return [(writes(shard), 0 if whole is None else writes(whole)) for _, shard, whole in managed]

    def _follow_changes(self) -> None:
        """Gather again where shards were written since the last forward; refuse what was written gathered."""
        now = self._writes()
        managed = zip(unit_parameters(self.modules[0]), now, self.seen or now, strict=True)
        for (name, shard, whole), (_, written), (_, before) in managed:
            if whole is not None and whole.requires_grad != shard.requires_grad:
                self._refuse(name, f"requires_grad was set to {whole.requires_grad}")
            if written != before:
                self._refuse(name, "it was written")
        if self.seen and now != self.seen:
            self.modules[0].reshard()
            self.was_whole = False

    def _refuse(self, name: str, what: str) -> None:
        raise ValueError(
            f"{name} of the unit {self.name or 'root'!r}: {what} while it was gathered, after a forward that recorded "
            "a graph and had no backward, so that its shards do not know; run such a forward under torch.no_grad(), or "
            "call reshard() on the model's FSDP modules before you change parameters"
        )

    def _gather_outside_inference_mode(self) -> None:
        """Once: memory that FSDP2 allocates in inference mode is of no use to a training step."""
        first = [whole for _, _, whole in unit_parameters(self.modules[0])]
        if None in first:
            with torch.inference_mode(False):
                self.modules[0].unshard()
                self.modules[0].reshard()


def _may_have_graph(output: Any) -> bool:
    """Whether an output may be part of a graph; yes for what holds tensors in a way unknown here."""
    if isinstance(output, torch.Tensor):
        return output.requires_grad
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return not (output is None or isinstance(output, (bool, int, float, str)))
    return any(_may_have_graph(item) for item in output)
