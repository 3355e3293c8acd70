"""Expert parallelism in place: each rank holds a slice of every layer's experts, the model's modules stay."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.utils.parametrize import is_parametrized

from am_moe._torch_compat import has_gradient_hooks
from am_moe.expert_parallel.calls import CALLS, Spread, through_ranks
from am_moe.expert_parallel.dispatch import Dispatcher, DispatcherName
from am_moe.expert_parallel.dispatchers import get_dispatcher
from am_moe.expert_parallel.experts import (
    Experts,
    describe,
    describe_experts,
    given_forward,
    routes_itself,
    ships_with_transformers,
)
from am_moe.expert_parallel.trial import signature, try_with_numbers

_HOW_TO_ADAPT = (
    "merge it into the weights before apply_ep, or adapt other modules (peft: target_modules, not target_parameters)"
)


def apply_ep(
    model: nn.Module,
    ep_mesh: DeviceMesh,
    moe_mesh: DeviceMesh | None = None,
    *,
    dispatcher: DispatcherName | Dispatcher = "all_to_all",
    tp_mesh: DeviceMesh | None = None,
) -> nn.Module:
    """Spread the experts of every layer over the ranks of an axis, in place.

    Names, routers and the experts' own forward stay; their parameters become DTensors sharded on the expert dim, and
    each rank runs the forward on the rows that need its slice. **Gradients are right when `backward()` returns**, by
    the convention of data parallelism, of which the expert axis is a part: every rank's loss is the mean of its own
    tokens, and gradients are averages over the data-parallel ranks. The style divides expert gradients, to which the
    tokens of all ranks contribute, by the axis's size; whoever does data parallelism averages the rest. An auxiliary
    loss over router logits is that of this rank's tokens, as under data parallelism.

    Args:
        model: real, or on the meta device; any model in which `find_experts` finds something: experts that take their
            routing (`routed`, all but two of transformers' classes), that take the same rows for every expert (`rows`,
            Llama 4), or that are linear maps of sorted rows (`linear`, JetMoE). Of stacked parameters with rows beyond
            the last expert, which no token ever reads (LongCat Flash), those rows are dropped.
        ep_mesh: one-dimensional; its size divides the number of experts.
        moe_mesh: the mesh that `ep_mesh` is an axis of, if there is one; only checked.
        dispatcher: how tokens travel: `all_to_all`, `all_gather`, `local` or an object that is a `Dispatcher`.
        tp_mesh: ranks that hold the same tokens, if the expert axis or its copies go across such ranks: each then
            sends its share of the tokens and gathers the results, so that no token is computed twice.

    Returns:
        The model.

    Collectives: with real weights, the experts are scattered from the axis's first rank; then those of the dispatcher
        in every layer, and with `tp_mesh` an all-gather of its rows forward, of their gradients backward.

    Raises:
        ValueError: no experts, experts that do not divide over the axis or are distributed already, experts with an
            adapter or gradient hooks on their parameters, tied, or with parameters that may be each expert's or
            everyone's, experts of which ranks would together compute something else than the module (`trial`; one of
            transformers' own classes is not tried), a mesh with several axes, an unknown dispatcher; on every rank
            alike.
    """
    spread_with(model, ep_mesh, moe_mesh, ExpertParallel(dispatcher=dispatcher, tp_mesh=tp_mesh))
    return model


def spread_with(model: nn.Module, ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None, style: ExpertParallel) -> None:
    """`apply_ep` with a style, which tries no experts again that it has tried in `check_spread`."""
    _check_meshes(ep_mesh, moe_mesh, style.tp_mesh)
    for experts in check_spread(model, ep_mesh, style):
        style._apply(model.get_submodule(experts.name), ep_mesh)


def check_spread(model: nn.Module, ep_mesh: DeviceMesh, style: ExpertParallel) -> list[Experts]:
    """The experts of a model that can be spread over an axis; what `apply_ep` would refuse is refused."""
    found = describe_experts(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts to spread: {_why_none(model)}")
    check_adapters(found)
    _check_ties(model, found)
    for experts in found:
        style.check(experts, model.get_submodule(experts.name), ep_mesh)
    return found


class ExpertParallel(ParallelStyle):
    """A parallel style for one experts module: dim 0 of each parameter, the expert dim, is sharded over the mesh.

    Rank p of 4 with 8 experts holds::

        rank 0: 0 1    rank 1: 2 3    rank 2: 4 5    rank 3: 6 7

    Args:
        dispatcher, tp_mesh: as in `apply_ep`.
    """

    def __init__(
        self, *, dispatcher: DispatcherName | Dispatcher = "all_to_all", tp_mesh: DeviceMesh | None = None
    ) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.tp_mesh = tp_mesh
        self._tried: set[tuple] = set()

    def check(self, experts: Experts, module: nn.Module, device_mesh: DeviceMesh) -> None:
        """Refuse a module that cannot be spread over the mesh, before anything is sent."""
        size = device_mesh.size()
        get_dispatcher(self.dispatcher, size)
        name = experts.name or experts.kind
        if any(isinstance(module.get_parameter(path), DTensor) for path in experts.stacked):
            raise ValueError(
                f"the experts of {name} are distributed already; apply expert parallelism once, before FSDP"
            )
        if experts.num_experts % size:
            fits = [d for d in range(1, experts.num_experts + 1) if experts.num_experts % d == 0]
            raise ValueError(
                f"the {experts.num_experts} experts of {name} do not divide over {size} ranks; an axis can have {fits}"
            )
        if any("." not in path for path in experts.shared):
            raise ValueError(f"{experts.shared} of {name} have no expert dim; parameters all share go in a submodule")
        if unclear := _of_each_or_of_all(experts, module):
            raise ValueError(
                f"{unclear} of {name} have {experts.num_experts} rows, as many as there are experts, in a submodule: "
                "they may be one for each expert or shared by all; move those of each expert to the module itself"
            )
        if any(is_parametrized(part) for part in module.modules()):
            raise ValueError(f"{name} has parametrized weights, which cannot be spread; {_HOW_TO_ADAPT}")
        if hooked := [path for path in experts.stacked if has_gradient_hooks(module.get_parameter(path))]:
            raise ValueError(
                f"{hooked} of {name} have gradient hooks, which would be lost: each rank gets parameters of its own; "
                "register them after apply_ep"
            )
        if not ships_with_transformers(module) and (form := (signature(module), size)) not in self._tried:
            try_with_numbers(experts, module, size, device_mesh.device_type)
            self._tried.add(form)

    def _partition_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        source = getattr(self, "src_data_rank", 0)
        experts = _described(module)
        for path, rows in experts.stacked.items():
            prefix, _, leaf = path.rpartition(".")
            owner = module.get_submodule(prefix)
            parameter = owner.get_parameter(leaf)
            used = parameter.detach()[: experts.num_experts * rows]
            local = distribute_tensor(used, device_mesh, [Shard(0)], src_data_rank=source)
            spread = nn.Parameter(local, requires_grad=parameter.requires_grad)
            vars(spread).update(vars(parameter))  # such as marks that an optimizer goes by
            owner.register_parameter(leaf, spread)

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        experts = _described(module)
        self.check(experts, module, device_mesh)
        self._partition_fn("", module, device_mesh)
        module.spread_experts = Spread(
            experts,
            device_mesh,
            experts.num_experts // device_mesh.size(),
            get_dispatcher(self.dispatcher, device_mesh.size()),
            self.tp_mesh,
            given_forward(module),
        )
        module.forward = types.MethodType(_forward, module)
        return module


@torch.compiler.disable
def _forward(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What an experts module does instead of its own forward; runs that on the rows this rank received.

    A compiled layer calls it as it is: how many rows come is known only while it runs.
    """
    if is_parametrized(module):
        raise ValueError(f"an adapter was put on the parameters of {type(module).__name__}; {_HOW_TO_ADAPT}")
    spread: Spread = module.spread_experts
    names = spread.experts.arguments
    through = functools.partial(through_ranks, module, spread)
    return CALLS[spread.experts.call](through, spread.experts, *args, *(kwargs[name] for name in names[len(args) :]))


def check_adapters(found: list[Experts]) -> None:
    """Refuse experts whose parameters an adapter changes, as peft's `target_parameters` does.

    Such an adapter holds the factors of all experts in matrices of its own, outside of the module that is spread.
    """
    for experts in found:
        if "base_layer" in experts.name.split("."):
            raise ValueError(f"an adapter wraps the expert parameters of {experts.name}; {_HOW_TO_ADAPT}")


def _check_ties(model: nn.Module, found: list[Experts]) -> None:
    """Refuse expert parameters that are another parameter of the model, too: each rank's slice would be one of two."""
    names: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(parameter, []).append(f"{prefix}.{leaf}".lstrip("."))
    for experts in found:
        for path in experts.stacked:
            tied = names[model.get_parameter(f"{experts.name}.{path}".lstrip("."))]
            if len(tied) > 1:
                raise ValueError(
                    f"the expert parameters {tied} are one and the same, which cannot be kept when experts are spread; "
                    "share the experts module itself, or give each its own parameter"
                )


def _of_each_or_of_all(experts: Experts, module: nn.Module) -> list[str]:
    """Parameters of submodules with E rows, where nothing beside them says that the rows are the experts."""
    shapes = {path: module.get_parameter(path).shape for path in (*experts.stacked, *experts.shared) if "." in path}
    of_experts = {path.rpartition(".")[0] for path, shape in shapes.items() if len(shape) == 3}
    return [
        path
        for path, shape in shapes.items()
        if shape[:1] == (experts.num_experts,) and (path in experts.shared or path.rpartition(".")[0] not in of_experts)
    ]


def _described(module: nn.Module) -> Experts:
    found = describe("", module)
    if found is None:
        raise ValueError(f"{type(module).__name__} holds no stacked experts: {_why_none(module)}")
    return found


def _why_none(model: nn.Module) -> str:
    """The nearest thing to experts in a model without any that can be spread."""
    for name, module in model.named_modules():
        if routes_itself(module):
            return (
                f"{name or type(module).__name__} holds stacked parameters, but its forward takes "
                f"{[*inspect.signature(type(module).forward).parameters][1:]} and is not proved to compute each row "
                "with one expert; move its routing out of it, as am_moe.MoE says"
            )
        children = list(module.children())
        if "expert" in name.lower() and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(children) > 1:
            return f"{name} holds {len(children)} separate modules; stack their parameters as am_moe.MoE does"
    return (
        "no module with stacked 3-D parameters, `num_experts` and "
        "forward(hidden_states, top_k_index, top_k_weights); see am_moe.MoE"
    )


def _check_meshes(ep_mesh: DeviceMesh, moe_mesh: DeviceMesh | None, tp_mesh: DeviceMesh | None) -> None:
    if ep_mesh.ndim != 1:
        raise ValueError(f"ep_mesh must have one axis, got {ep_mesh.mesh_dim_names}; pass moe_mesh['ep'] or the like")
    names = ep_mesh.mesh_dim_names
    if moe_mesh is not None and names and not set(names) <= set(moe_mesh.mesh_dim_names or ()):
        raise ValueError(f"ep_mesh is the axis {names}, but moe_mesh has {moe_mesh.mesh_dim_names}")
    if tp_mesh is not None and tp_mesh.ndim != 1:
        raise ValueError(f"tp_mesh must have one axis, got {tp_mesh.mesh_dim_names}")
