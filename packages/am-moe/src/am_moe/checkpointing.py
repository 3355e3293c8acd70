"""Recompute a block's activations in backward instead of keeping them, with the routing it had."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from am_moe.data_parallel.units import stacks_of_units, turn_off_caches
from am_moe.expert_parallel.collectives import asked, asked_now
from am_moe.expert_parallel.experts import describe_experts

_PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm", "einsum", "tensordot"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def apply_ac(
    model: nn.Module,
    ignore_router: bool = False,
    hidden_size: int | None = None,
    num_experts: int | None = None,
) -> nn.Module:
    """Recompute each block in backward, in place and without wrappers: names in `state_dict` stay.

    Of a block only its input is kept, and with `ignore_router` what its routers computed and what the dispatchers
    received: recomputation then takes the same experts whatever happens in between, and nothing travels again. Apply it
    after `apply_ep` and before `apply_fsdp`. A key-value cache would be filled twice, so `model.config.use_cache` is
    set to False.

    Args:
        model: blocks in `ModuleList`s, prediction heads (`mtp.layers`) included.
        ignore_router: keep routing decisions and dispatched rows.
        hidden_size: D, by which the router's product `(T, D) @ (D, E)` is known; that of `model.config` if None.
        num_experts: E; that of the model's experts, or of its config, if None.

    Returns:
        The model.

    Collectives: none here. Recomputation repeats those of the forward, on every rank alike; with `ignore_router` none
        of the expert axis.

    Raises:
        ValueError: no blocks; `ignore_router` without sizes to be had; layers that share keys and values through a
            cache, which recomputation would not find as it was.
    """
    config = _text_config(model)
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"{type(model).__name__} shares keys and values between layers (num_kv_shared_layers="
            f"{config.num_kv_shared_layers}), which recomputation would not find again; leave it out"
        )
    router = _router_shape(model, config, hidden_size, num_experts) if ignore_router else None
    blocks = [layer for stack in stacks_of_units(model) for layer in stack]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no ModuleList of blocks to recompute")
    turn_off_caches(model)
    for block in blocks:
        how = {"context_fn": _Kept(block, router).contexts} if router else {}
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **how)
    return model


class _Kept:
    """What one block keeps of its routing: products with its routers' matrices, and what its dispatchers received.

    What `topk` returns is not kept, since many routers go on in place on it; of the same products it chooses the same.
    Selective checkpointing of torch would ask Python about each operator. Here the dispatchers ask themselves, and
    functions are looked at where the router runs: in a first forward in the whole block, and if all products were found
    in the modules that own the matrices, in these alone from then on.
    """

    def __init__(self, block: nn.Module, router: tuple[int, int]) -> None:
        self.router = router
        self.everywhere = True
        self.in_owner = False
        for module in block.modules():
            if any(tuple(p.shape) in (router, router[::-1]) for p in module.parameters(recurse=False)):
                module.forward = functools.partial(self._forward_of_owner, module.forward)

    def contexts(self) -> tuple[_Pass, _Pass]:
        """Of one forward and its recomputation."""
        kept: dict[str, list[torch.Tensor]] = defaultdict(list)
        return _Pass(self, kept, reuses=False), _Pass(self, kept, reuses=True)

    def _forward_of_owner(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = asked_now()
        if not isinstance(running, _Pass) or running.of is not self:
            return forward(*args, **kwargs)
        self.in_owner = True
        try:
            with nullcontext() if self.everywhere else _Products(running):
                return forward(*args, **kwargs)
        finally:
            self.in_owner = False


class _Pass:
    """One forward of a block, or its recomputation."""

    def __init__(self, of: _Kept, kept: dict[str, list[torch.Tensor]], reuses: bool) -> None:
        self.of, self.kept, self.reuses = of, kept, reuses
        self.used: Counter[str] = Counter()
        self.found_outside = False

    def __enter__(self) -> None:
        self.used.clear()
        self._stack = ExitStack()
        self._stack.enter_context(asked(self))
        if self.of.everywhere:
            self._stack.enter_context(_Products(self))

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if not self.reuses and error[0] is None and self.kept["routing"]:
            self.of.everywhere = self.found_outside

    def exchange(self, name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What a collective of a dispatcher returned or, recomputing, had returned."""
        if self.reuses:
            return self._next(name).detach()
        out = run()
        self.kept[name].append(out.detach())  # nobody changes what was received
        return out

    def product(self, out: torch.Tensor) -> None:
        """A product with a router's matrix, which gets the values it had."""
        if self.reuses:
            out.detach().copy_(self._next("routing"))  # the backward of a product reads its inputs alone
        else:
            self.found_outside |= not self.of.in_owner
            self.kept["routing"].append(out.detach().clone())  # a model may change its router's logits in place

    def _next(self, what: str) -> torch.Tensor:
        self.used[what] += 1
        return self.kept[what][self.used[what] - 1]


class _Products(TorchFunctionMode):
    """Shows a pass the products of rows `(..., D)` with a router's matrix, `(D, E)` or `(E, D)`."""

    def __init__(self, running: _Pass) -> None:
        super().__init__()
        self.running = running

    def __torch_function__(self, func, types, args: tuple = (), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", None) in _PRODUCTS and isinstance(out, torch.Tensor):
            router = self.running.of.router
            given = (*args, *(kwargs or {}).values())
            matrices = (arg for arg in given if isinstance(arg, torch.Tensor) and arg.dim() == 2)
            if out.shape[-1] == router[1] and any(tuple(m.shape) in (router, router[::-1]) for m in matrices):
                self.running.product(out)
        return out


def _router_shape(model: nn.Module, config: Any, hidden: int | None, experts: int | None) -> tuple[int, int]:
    hidden = hidden or getattr(config, "hidden_size", None)
    if experts is None:
        found = describe_experts(model)
        named = (getattr(config, name, None) for name in _COUNTS)
        experts = found[0].num_experts if found else next((n for n in named if isinstance(n, int)), None)
    return _positive(model, "hidden_size", hidden), _positive(model, "num_experts", experts)


def _positive(model: nn.Module, name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"ignore_router=True needs {name}, got {value!r}; {type(model).__name__} does not say it")
    return value


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
