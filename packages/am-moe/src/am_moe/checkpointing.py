"""Recompute a block's activations in backward instead of keeping them, with the routing it had."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from am_moe.experts import describe_experts
from am_moe.units import layers

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
    how: dict[str, Any] = {"use_reentrant": False}
    if ignore_router:
        router = _router_shape(model, config, hidden_size, num_experts)
        how["context_fn"] = functools.partial(_keep_and_reuse, router)
    blocks = layers(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no ModuleList of blocks to recompute")
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, **how)
    return model


def _keep_and_reuse(router: tuple[int, int]) -> tuple[_Keep, _Reuse]:
    kept: dict[Any, list[torch.Tensor]] = defaultdict(list)
    return _Keep(router, kept), _Reuse(router, kept)


class _Keep(TorchDispatchMode):
    """In the forward: keep what the dispatchers received, and products with a matrix of the router's shape.

    What `topk` returns is not kept, since many routers go on in place on it; of the same products it chooses the same.
    Selective checkpointing of torch counts every operator, those of FSDP2 too, which are others when recomputing; here
    nothing but what is kept is counted.
    """

    def __init__(self, router: tuple[int, int], kept: dict[Any, list[torch.Tensor]]) -> None:
        super().__init__()
        self.router, self.kept = router, kept

    def __torch_dispatch__(self, func, types, args: tuple = (), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if what := _what_to_keep(func, args, self.router):
            # A model may change its router's logits in place; nobody changes what was received.
            self.kept[func].append(out.clone() if what == "product" else out.detach())
        return out


class _Reuse(TorchDispatchMode):
    """When recomputing: what was kept, in order, instead of computing and sending it again."""

    def __init__(self, router: tuple[int, int], kept: dict[Any, list[torch.Tensor]]) -> None:
        super().__init__()
        self.router, self.kept = router, kept
        self.used: Counter[Any] = Counter()

    def __enter__(self):
        self.used.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args: tuple = (), kwargs=None):
        what = _what_to_keep(func, args, self.router)
        if not what:
            return func(*args, **(kwargs or {}))
        self.used[func] += 1
        kept = self.kept[func][self.used[func] - 1]
        return kept.clone() if what == "product" else kept.detach()


def _what_to_keep(function: Any, args: tuple, router: tuple[int, int]) -> str | None:
    name = function._schema.name
    if name.startswith("am_moe::"):
        return "received"
    return "product" if name in ("aten::mm", "aten::addmm") and tuple(args[-1].shape) == router else None


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
