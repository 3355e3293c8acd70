"""Find the modules that hold stacked experts, by structure, and say what they are as plain data."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from am_moe.expert_parallel.rows_form import computes_rows_alone

# How an experts module is called, by the names of what its forward takes. `routed`: tokens with their choices; `rows`:
# as many rows for every expert, one expert after the other; `linear`: rows sorted by expert, and how many are each's.
# A forward that takes `hidden_states` alone says nothing of routing: what it computes has to be proved.
_CALLS = {
    ("hidden_states", "top_k_index", "top_k_weights"): "routed",
    ("hidden_states", "router_indices", "routing_weights"): "routed",
    ("hidden_states",): "rows",
    ("inputs", "expert_size"): "linear",
}
# The names by which transformers knows the kernels that it ships for experts.
_KERNELS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_COUNTS = ("num_experts", "num_routed_experts")


class MoE(Protocol):
    """What a module of your own must be for `apply_ep` to spread it: stacked experts, called with routing decisions.

    transformers 5 writes its experts like this. Routing stays outside, in whatever calls the module: its scores,
    groups, auxiliary losses and biases are the model's own and see nothing of expert parallelism.

    Attributes:
        num_experts: E, the first dim of every stacked parameter (`weight (E, D, I)`, `bias (E, I)`, ...). While this
            rank computes, the module sees its own slice of the parameters and their number here. Parameters of
            submodules whose first dim is not E, such as a norm, are shared by all experts and stay whole.
    """

    num_experts: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of each token's experts, weighted.

        Args:
            hidden_states: `(T, D)`, any float dtype.
            top_k_index: `(T, K)`, int64 in `[0, num_experts)`. Expert parallelism calls it with K = 1: one row for each
                choice that falls on this rank, so that no id ever means "none".
            top_k_weights: `(T, K)`, any float dtype.

        Returns:
            `(T, D)`; each row depends on its own token and choices only.
        """
        ...


@dataclass(frozen=True)
class Experts:
    """What an experts module is.

    Attributes:
        name: its full name in the model.
        kind: the name of its class.
        num_experts: E, how many experts it holds in the whole model.
        call: `routed`, `rows` or `linear`; see `apply_ep`.
        arguments: the names of what its forward takes.
        stacked: for each parameter with an expert dim, always dim 0, how many of its rows belong to one expert: 1, or
            more where experts lie one below the other in a matrix.
        shared: parameters that all experts use.
        identity: ids of `num_experts` and above return the token itself, weighted.
        counter: the attribute that says E.
    """

    name: str
    kind: str
    num_experts: int
    call: str
    arguments: tuple[str, ...]
    stacked: dict[str, int]
    shared: tuple[str, ...]
    identity: bool
    counter: str

    def __str__(self) -> str:
        stacked = ", ".join(name if rows == 1 else f"{name} ({rows} rows each)" for name, rows in self.stacked.items())
        shared = f"; shared {', '.join(self.shared)}" if self.shared else ""
        identity = "; larger ids return the token" if self.identity else ""
        return f"{self.name}: {self.num_experts} experts of {self.kind}, {self.call}; {stacked}{shared}{identity}"


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a model that holds stacked experts, with its full name, in order.

    Such a module has parameters whose first dim counts the experts (`gate_up_proj` of shape `(E, 2I, D)` and the like),
    an attribute `num_experts`, and a forward like that of `MoE`. All of transformers 5 is found, wherever it is in the
    model (multi-token-prediction heads and the towers of multimodal models too), and so is a module of your own.
    A module whose forward takes `hidden_states` alone is one only if `rows_form` proves that each row goes through the
    expert of its place: a block that routes its tokens itself is none. `describe_experts` says what each is.
    """
    return [(experts.name, model.get_submodule(experts.name)) for experts in describe_experts(model)]


def describe_experts(model: nn.Module) -> list[Experts]:
    """What `find_experts` finds, as plain data that can be printed: names, numbers and the parameters with experts."""
    return [found for name, module in model.named_modules() if (found := describe(name, module))]


def describe(name: str, module: Any) -> Experts | None:
    """What one module is if it holds stacked experts, else None."""
    if (spread := vars(module).get("spread_experts")) is not None:
        return replace(spread.experts, name=name)
    arguments = tuple(inspect.signature(type(module).forward).parameters)[1:]
    call = _CALLS.get(arguments)
    counter = next((c for c in _COUNTS if isinstance(getattr(module, c, None), int)), None)
    if call is None or counter is None:
        return None
    experts = getattr(module, "num_global_experts", getattr(module, counter))
    own = dict(module.named_parameters(recurse=False))
    everything = own if call != "routed" else dict(module.named_parameters())
    cubes = any(p.dim() == 3 and p.shape[0] >= experts for p in everything.values())
    stacked: dict[str, int] = {}
    for path, parameter in everything.items():
        rows = parameter.shape[0] if parameter.dim() else 0
        unread = parameter.dim() == 3 and rows > experts and _has_identity(module)
        if unread or (rows == experts and (parameter.dim() > 1 or path in own)):
            stacked[path] = 1
        elif parameter.dim() == 2 and not cubes and rows and rows % experts == 0:
            stacked[path] = rows // experts
    if not stacked or not (cubes or call == "routed"):
        return None
    if call == "rows" and not computes_rows_alone(module, list(stacked), experts):
        return None
    shared = tuple(path for path in everything if path not in stacked)
    kind = type(module).__name__.removeprefix("FSDP")
    return Experts(name, kind, experts, call, arguments, stacked, shared, _has_identity(module), counter)


def own_forward(module: Any) -> Callable[..., Any]:
    """What a module computes by itself, spread or not: the forward that it was given, or else that of its class."""
    given = given_forward(module)
    return given if given is not None else types.MethodType(type(module).forward, module)


def given_forward(module: Any) -> Callable[..., Any] | None:
    """The forward that was set at a module itself, as wrappers do, before it was spread."""
    spread = vars(module).get("spread_experts")
    return vars(module).get("forward") if spread is None else spread.given_forward


def computes_as_transformers(module: Any) -> bool:
    """Whether forward and gate are those that transformers ships, with a kernel of its own.

    A class derived from one of transformers has them unless it overrides them. What its flags say of a module with
    another forward is not what it computes.
    """
    if given_forward(module) is not None or "_apply_gate" in vars(module):
        return False
    functions = [type(module).forward, getattr(type(module), "_apply_gate", type(module).forward)]
    kernel = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return kernel in _KERNELS and all(
        (getattr(function, "__module__", None) or "").startswith("transformers.") for function in functions
    )


def ships_with_transformers(module: Any) -> bool:
    """Whether a module is one of transformers' own, as it is: what those compute is known and measured."""
    parts = [type(part).__module__.partition(".")[0] for part in module.modules()]
    functions = [f for name, f in vars(module).items() if name != "config" and isinstance(f, _FUNCTIONS)]
    return (
        type(module).__module__.startswith("transformers.")
        and computes_as_transformers(module)
        and set(parts) <= {"torch", "transformers"}
        and all((f.__module__ or "").partition(".")[0] in ("torch", "transformers") for f in functions)
        and not any(True for _ in module.buffers())
        and all(p.is_floating_point() and p.dtype.itemsize > 1 for p in module.parameters())
    )


def routes_itself(module: Any) -> bool:
    """Whether a module holds stacked experts, but takes tokens without their routing and is of no proven form."""
    counts = [count for name in _COUNTS if isinstance(count := getattr(module, name, None), int)]
    own = [*module.parameters(recurse=False)]
    return any(p.dim() == 3 and p.shape[0] in counts for p in own) and describe("", module) is None


def _has_identity(module: Any) -> bool:
    return isinstance(getattr(module, "identity_expert", None), nn.Identity)
