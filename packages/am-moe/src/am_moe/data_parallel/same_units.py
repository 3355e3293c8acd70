# A copy of packages/am-fsdp/src/am_fsdp/layout/same_units.py, made by `nox -s copies`: edit that one.
"""Ranks that shard a model together run the same units in the same order, or raise.

FSDP2 gathers a unit on all ranks at once, and goes by order alone: where one rank skips a layer and another does not,
both compute with halves of two layers. So that this is never trained on:

    layer drop                  a rank that drops a layer runs it beside the forward, with gradients of zero
    a choice among modules      in one unit, as heads by task: ranks that did not use one add zeros to its gradient
    anything else               the first forward of each kind is compared over the ranks, unit by unit; a later one
                                that runs other units than the first did raises before it asks for them
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from am_moe._torch_compat import in_backward, reduces_unused, unit_parameters
from am_moe.data_parallel.evaluation import outside_graphs
from am_moe.data_parallel.same_towers import (
    Towers,
    WithZeros,
    of_some_ranks,
    on_every_rank,
    reached_parameters,
    tensors_in,
)


def keep_units_in_step(model: nn.Module, mesh: DeviceMesh, towers: Towers | None) -> None:
    """From now on, a forward in which ranks of a mesh would run other units than each other raises, in place.

    Args:
        model: after the last `fully_shard`.
        mesh: the ranks that shard it together, one axis or two.
        towers: what `run_towers_on_every_rank` returned.

    Gradients of parameters that belong to a choice of the model, `nn.ModuleDict` or `nn.ModuleList` of several modules
    of one class in one unit, are zeros where no rank used them (torch 2.13 or newer).

    Collectives: in the first forward of each kind (training or evaluation, with gradients or without, of which inputs
        where the model has several stacks), two small gathers for each unit; none later.

    Raises:
        ValueError: from a forward: ranks run other units or train other parameters, on every rank; or this rank runs
            other units than in the first forward of this kind, on this rank.
    """
    if mesh.size() == 1 or any(dist.get_backend(mesh.get_group(axis)) == "fake" for axis in range(mesh.ndim)):
        return
    for unit in model.modules():
        if isinstance(unit, FSDPModule) and chooses(unit) and hasattr(unit, "set_reduce_scatter_unused_params"):
            unit.set_reduce_scatter_unused_params(True, recurse=False)
    steps = _Steps(model, mesh, towers)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and module is not model:
            module.register_forward_pre_hook(steps.arriving(name), prepend=True)
    model.register_forward_pre_hook(steps.begin)
    model.register_forward_hook(steps.end)
    for owner in model.modules():
        for stack in owner.children():
            sharded = isinstance(stack, nn.ModuleList) and any(isinstance(layer, FSDPModule) for layer in stack)
            if sharded and _drops_layers(owner):
                _DroppedLayers(owner, stack)


class _Steps:
    def __init__(self, model: nn.Module, mesh: DeviceMesh, towers: Towers | None) -> None:
        self.model, self.mesh, self.towers = model, mesh, towers
        self.known: dict[tuple, list[str]] = {}  # by kind of forward, the units that it runs
        self.ran: list[str] | None = None  # in this forward; None outside of any

    @outside_graphs
    def begin(self, _model: nn.Module, _args: Any) -> None:
        given = self.towers.given if self.towers is not None else ()
        self.kind = (self.model.training, torch.is_grad_enabled(), given)
        self.first = self.known.get(self.kind)
        mixed = self.towers is not None and self.towers.mixed  # it compares them itself
        self.ran = None if mixed else []

    def arriving(self, name: str) -> Callable[..., None]:
        @outside_graphs
        def arrive(_module: nn.Module, _args: Any) -> None:
            if self.ran is None or in_backward():  # recomputed there
                return
            self._compare(name)
            self.ran.append(name)

        return arrive

    @outside_graphs
    def end(self, model: nn.Module, _args: Any, output: Any) -> None:
        if self.ran is None:
            return
        self._compare("the end of its forward")
        if self.first is None:
            self._compare_trained(model, output)
            self.known[self.kind] = self.ran
        self.ran = None

    def _compare(self, here: str) -> None:
        if self.first is None:
            places = sorted(set(on_every_rank(here, self.mesh)))
            if len(places) > 1:
                self._refuse(f"some ranks are at {' and others at '.join(places[:3])}")
            return
        place = len(self.ran or ())
        expected = self.first[place] if place < len(self.first) else "the end of its forward"
        if here != expected:
            self._refuse(f"this one is at {here}, where the first such forward was at {expected}")

    def _compare_trained(self, model: nn.Module, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        mine = reached_parameters(model, output)
        for unit in model.modules():
            if isinstance(unit, FSDPModule) and reduces_unused(unit):
                mine -= {name for name, _, _ in unit_parameters(unit)}
        if differ := of_some_ranks(mine, self.mesh):
            self._refuse(f"gradients of {', '.join(differ[:4])} would come from some ranks only")

    def _refuse(self, why: str) -> None:
        self.ran = None
        raise ValueError(
            f"ranks that shard {type(self.model).__name__} together have to run the same units, and {why}; let what "
            "is skipped not depend on a rank's own data or random numbers: run the module all the same, with its "
            "result times zero"
        )


def chooses(unit: nn.Module) -> bool:
    """Whether a unit itself, less the units in it, holds several modules of one class to choose from."""
    for child in unit.children():
        if isinstance(child, FSDPModule):
            continue
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            whole = [each for each in child.children() if any(True for _ in each.parameters())]
            kinds = Counter(type(each) for each in whole if not isinstance(each, FSDPModule))
            if any(number > 1 for number in kinds.values()):
                return True
        if chooses(child):
            return True
    return False


def _drops_layers(owner: nn.Module) -> bool:
    """Whether a module says of itself, or its config does, that it drops layers in training."""
    said = vars(owner) | getattr(getattr(owner, "config", None), "__dict__", {})
    return any("layerdrop" in name.replace("_", "") and _is_rate(value) for name, value in said.items())


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


class _DroppedLayers:
    """Layers that a rank drops, in the order of their list, run before the next one that it does not drop.

    They are given what that one gets, without its history, and their results are joined to what the owner returns with
    gradients of zero: backward comes to them in their place.
    """

    def __init__(self, owner: nn.Module, layers: nn.ModuleList) -> None:
        self.layers, self.beside = layers, []
        self.next = 0  # the layer that comes next
        self.given: Any = None  # to a layer, the last time: shapes at first, tensors within a forward
        self.running = False
        owner.register_forward_pre_hook(self._begin, with_kwargs=True)
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._reaching(place), prepend=True, with_kwargs=True)
        owner.register_forward_hook(self._end)

    @outside_graphs
    def _begin(self, _owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.next, self.running = 0, False
        # Where all layers are dropped, nothing else may need what an encoder made.
        self.beside = [tensor for tensor in tensors_in([args, kwargs]) if tensor.requires_grad]

    def _reaching(self, place: int) -> Callable[..., None]:
        @outside_graphs
        def reach(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.running or in_backward() or not layer.training:
                return
            self.given = args, kwargs
            self._catch_up(place)
            self.next = place + 1

        return reach

    @torch.compiler.disable
    def _end(self, owner: nn.Module, _args: Any, output: Any) -> Any:
        if not owner.training or in_backward():
            return None
        self._catch_up(len(self.layers))
        self.given = _map(self.given, lambda tensor: _apart(torch.empty_like(tensor, device="meta"), tensor))
        beside, self.beside = self.beside, []
        if not beside:
            return None
        first = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
        return _map(output, lambda tensor: WithZeros.apply(tensor, *beside) if tensor is first else tensor)

    def _catch_up(self, place: int) -> None:
        if self.next >= place:
            return
        device = next(self.layers.parameters()).device
        others = [device] if device.type not in ("cpu", "meta") else []
        while self.next < place:
            if self.given is None:
                raise ValueError(
                    "this rank dropped every layer of its first forward, so that nobody knows what they are given; "
                    "set layerdrop to a smaller number, or to 0"
                )
            args, kwargs = _map(self.given, lambda x: _apart(torch.zeros_like(x, device=device) if x.is_meta else x, x))
            layer, self.next, self.running = self.layers[self.next], self.next + 1, True
            try:
                # A checkpoint that is going on around the next layer has no part in this, and the random numbers none.
                with (
                    torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
                    torch.random.fork_rng(others, device_type=device.type),
                ):
                    self.beside += [t for t in tensors_in(layer(*args, **kwargs)) if t.requires_grad]
            finally:
                self.running = False


def _apart(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor without history; FSDP2 reduces a layer's gradients when that of what it was given comes."""
    return tensor.detach().requires_grad_(like.requires_grad)


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)  # an output of transformers is a dict and a dataclass
        for name, item in value.items():
            changed[name] = _map(item, change)
        return changed
    if isinstance(value, (tuple, list)):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
