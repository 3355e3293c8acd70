# A copy of packages/am-fsdp/src/am_fsdp/layout/same_towers.py, made by `nox -s copies`: edit that one.
"""Ranks that shard a tower together all run it: one without images runs it on made-up ones, with gradients of zero.

FSDP2 gathers the parameters of a layer on all ranks at once; a rank that passed a tower by left others waiting.
Which towers run depends on which inputs are given, so ranks compare these before the first collective of a forward:

    inputs        rank with images                 rank without
    the same      nothing is done
    not the same  embedding, tower, decoder        embedding, tower (on ramps of the same shapes), decoder
                  gradients of its images          zeros: what the tower returned is joined to the embeddings

The first forward of each mixture is proved: ranks tell each other each FSDP unit before it runs, and after it which
parameters its graph reaches. Where these are not the same, every rank raises.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.modules.batchnorm import _BatchNorm

from am_moe._torch_compat import unit_parameters
from am_moe.data_parallel.evaluation import outside_graphs
from am_moe.data_parallel.units import stack_names

_WAITS = "the embedding, to run towers"


def run_towers_on_every_rank(model: nn.Module, mesh: DeviceMesh, mp_policy: MixedPrecisionPolicy) -> Towers | None:
    """From now on, a tower that any rank of a mesh runs in a forward is run by all of them, in place.

    Args:
        model: after the last `fully_shard`. Its towers are found by transformers' methods `get_image_features`,
            `get_video_features` and the like. Models with one stack of layers are left as they are.
        mesh: the ranks that shard it together, one axis or two.
        mp_policy: of the root, which casts floating-point inputs.

    Collectives of every forward (each axis of the mesh): one all-reduce of two numbers, with a host sync. Where inputs
        are not the same, a gather of their names and shapes; the first time, two small gathers for each unit too.

    Raises:
        ValueError: from a forward, on every rank: inputs differ, and no method of the model runs what one of them
            needs, or the ranks would run different layers or train different parameters.
    """
    stacks = stack_names(model)
    if len(stacks) < 2 or mesh.size() == 1:
        return None
    towers = Towers(model, mesh, mp_policy, stacks)
    model.register_forward_pre_hook(towers.before, prepend=True, with_kwargs=True)
    model.register_forward_hook(towers.after)
    model.__dict__["runs_towers_on_every_rank"] = True  # am-pipeline lets inputs of ranks differ where this is set
    return towers


class Towers:
    """Of one model: `given` are the names of what its forward was given, `mixed` whether ranks were given others."""

    def __init__(self, model: Any, mesh: DeviceMesh, mp_policy: MixedPrecisionPolicy, stacks: list[str]) -> None:
        self.mesh, self.mp_policy, self.stacks = mesh, mp_policy, stacks
        self.owner, names = _methods_of_towers(model)
        self.takes = {name: [*inspect.signature(getattr(self.owner, name)).parameters] for name in names}
        self.proved: dict[Any, bool] = {}  # mixtures of inputs, and whether the towers run before the embedding
        self.hooks: list[Any] = []  # of this forward
        self.to_run: list[Callable[[], Any]] = []
        self.features: list[torch.Tensor] = []
        self.given: tuple[str, ...] = ()

    @property
    def mixed(self) -> bool:
        return bool(self.hooks)

    @outside_graphs
    def before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._end()
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        given = {name: value for name, value in sorted(given.items()) if _holds(value)}
        self.given = tuple(given)
        if not self._differs(zlib.crc32(" ".join(given).encode())):
            return
        tower_inputs = {name for takes in self.takes.values() for name in takes}
        described = {n: _describe(v, n in tower_inputs) for n, v in given.items()}
        everyones = on_every_rank(described, self.mesh)
        self._check_inputs(model, everyones, tower_inputs)
        if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
            self._refuse(model, "its batch norms would count what is made up; freeze them with .eval()")
        known = {name: value for one in reversed(everyones) for name, value in one.items()}
        for method, takes in self.takes.items():
            if takes[0] in known and takes[0] not in given:
                made_up = {name: self._made_up(known[name]) for name in takes if name in known}
                self.to_run.append(functools.partial(getattr(self.owner, method), **made_up))
        trained = bytes(p.requires_grad for p in model.parameters())
        kinds = sorted({tuple(one) for one in everyones})
        self._prepare(model, (torch.is_grad_enabled(), model.training, trained, *kinds))

    @outside_graphs
    def after(self, model: nn.Module, _args: Any, output: Any) -> None:
        if not self.hooks:
            return
        if self.key not in self.proved:
            self._tell("the end")
            if differ := of_some_ranks(reached_parameters(model, output), self.mesh):
                self._refuse(model, f"gradients of {', '.join(differ[:4])} would come from some ranks only")
            self.proved[self.key] = self.first
        self._end()

    def _end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.to_run, self.features = [], [], []

    def _differs(self, number: int) -> bool:
        least_and_most = torch.tensor([-number, number], device=self.mesh.device_type)
        for axis in range(self.mesh.ndim):
            dist.all_reduce(least_and_most, dist.ReduceOp.MAX, group=self.mesh.get_group(axis))
        least, most = least_and_most.tolist()
        return -least != most

    def _check_inputs(self, model: Any, everyones: list[dict[str, Any]], tower_inputs: set[str]) -> None:
        """Refuse inputs of some ranks only that may decide what runs and that no method of the model takes."""
        run = {takes[0] for takes in self.takes.values()}
        for name in sorted(set().union(*everyones) - set.intersection(*map(set, everyones))):
            kind = next(one[name][0] for one in everyones if name in one)
            if (name not in tower_inputs or not run & set().union(*everyones)) and kind != "integers":
                self._refuse(model, f"{name} is given on some ranks only")
        try:
            known = isinstance(model.get_input_embeddings(), nn.Module)
        except (AttributeError, NotImplementedError):  # transformers does not know either
            known = False
        if not known:
            self._refuse(model, "it has no get_input_embeddings, beside which a tower could run")

    def _refuse(self, model: Any, why: str) -> None:
        raise ValueError(
            f"ranks that shard {type(model).__name__} together were given different inputs, such as images on some "
            f"ranks only, so that they would not all run {' and '.join(self.stacks)} ({why}); give every rank of a "
            "step the same kinds of inputs"
        )

    def _made_up(self, described: tuple) -> Any:
        kind, dtype, content = described
        if kind == "floats":
            if self.mp_policy.param_dtype is not None and self.mp_policy.cast_forward_inputs:
                dtype = self.mp_policy.param_dtype
            count = torch.Size(content).numel()
            # A ramp, because some norms have no gradient at zero.
            return torch.linspace(-1, 1, count, device=self.mesh.device_type).reshape(content).to(dtype)
        return torch.tensor(content, dtype=dtype, device=self.mesh.device_type) if kind == "integers" else content

    def _prepare(self, model: Any, key: Any) -> None:
        """Hooks of one forward, in which towers run on made-up inputs where this rank has none."""
        self.model, self.key = model, key
        self.first = self.proved.get(key, False)  # whether towers run before the embedding
        self.embedding = model.get_input_embeddings()
        if key not in self.proved:
            for name, module in model.named_modules():
                if module is self.embedding or (isinstance(module, FSDPModule) and module is not model):
                    hook = outside_graphs(lambda module, _args, name=name: self._arrive(module, name))
                    self.hooks.append(module.register_forward_pre_hook(hook, prepend=True))
        elif self.first:
            self.hooks.append(self.embedding.register_forward_pre_hook(outside_graphs(self._run), prepend=True))
        self.hooks.append(self.embedding.register_forward_hook(self._join))

    def _run(self, *_: Any) -> None:
        while self.to_run:
            found = self.to_run.pop(0)()
            used = [getattr(found, name, None) for name in ("pooler_output", "deepstack_features")]
            self.features += [f for f in tensors_in(found if used[0] is None else used) if f.requires_grad]

    @torch.compiler.disable
    def _join(self, _module: nn.Module, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        self._run()
        features, self.features = self.features, []
        return WithZeros.apply(embedded, *features) if features else embedded

    def _arrive(self, module: nn.Module, name: str) -> None:
        """Before a unit: every rank must be there, or wait at the embedding for the towers of this rank."""
        while True:
            waits = module is self.embedding and bool(self.to_run)
            where = self._tell(_WAITS if waits else name, name)
            if not where:
                return
            self.first = True
            if waits:
                self._run()

    def _tell(self, here: str, name: str | None = None) -> bool:
        """Whether some ranks wait at the embedding while the others are at a tower."""
        embedding = next(n for n, module in self.model.named_modules() if module is self.embedding)
        everywhere = set(on_every_rank(here, self.mesh))
        units = everywhere - {_WAITS}
        if len(units) > 1 or (_WAITS in everywhere and not units <= {embedding} and self.first):
            self._refuse(self.model, f"some ranks are at {' and others at '.join(sorted(everywhere))}")
        return _WAITS in everywhere and bool(units) and units != {embedding}


class WithZeros(torch.autograd.Function):
    """The first tensor as it is; the others are part of its graph, and their gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        return *gradients, *(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.others)


def _methods_of_towers(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The outermost module with methods such as `get_image_features`, and their names."""
    for module in model.modules():
        names = [n for n in dir(type(module)) if n.startswith("get_") and n.endswith("_features")]
        if towers := [name for name in names if name != "get_text_features"]:
            return module, towers
    return model, []


def _holds(value: Any) -> bool:
    """Whether an input is there: no None, no empty tensor or list."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    return value is not None and not (isinstance(value, (list, tuple, dict)) and not value)


def _describe(value: Any, with_content: bool) -> tuple:
    """Kind, dtype and what a rank without this input needs to make one up: a shape, or the integers themselves."""
    if not isinstance(value, torch.Tensor):
        return "object", None, value if with_content else None
    if value.is_floating_point():
        return "floats", value.dtype, tuple(value.shape)
    return "integers", value.dtype, value.tolist() if with_content else None


def on_every_rank(mine: Any, mesh: DeviceMesh) -> list[Any]:
    """What each rank of a mesh says, in the same order on every rank."""
    known = [mine]
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, known, group=group)
        known = [one for some in heard for one in some]
    return known


def of_some_ranks(mine: set[str], mesh: DeviceMesh) -> list[str]:
    """The names that some ranks of a mesh have and others have not."""
    everyones = on_every_rank(mine, mesh)
    return sorted(set().union(*everyones) - set.intersection(*everyones))


def reached_parameters(model: nn.Module, output: Any) -> set[str]:
    """The names of the trained parameters that the graph of an output reaches."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            names |= {id(whole): name for name, _, whole in unit_parameters(module)}
    nodes = [tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(names.get(id(node.variable), "another tensor"))
        following = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= following
        nodes += following
    return found


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
