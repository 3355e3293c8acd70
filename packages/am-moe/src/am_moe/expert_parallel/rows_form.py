"""Prove, without memory or values, that a module computes each row of `(E C, D)` with the expert of its block.

E experts      C rows for each      D features

The module's own forward runs once on meta tensors. Every tensor it makes is followed: it is `rows` while its leading
dims are E C, or E and C, in the order of the input. Only operators with a rule below keep that: views that leave the
rows in order, products of a block with its own expert, cuts of the features, and functions of single numbers that make
zero of zero. Whatever else runs, such as a router's product or a softmax, is no proof.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ZERO_STAYS_ZERO = {"silu", "gelu", "relu", "tanh", "neg", "hardswish", "mish", "square", "_to_copy", "clone", "detach"}
_CUTS = {"split", "split_with_sizes", "slice"}


def computes_rows_alone(module: nn.Module, stacked: list[str], experts: int) -> bool:
    """Whether row `e C + c` of the result is a function of that row and of expert e alone, and zero for a row of zeros.

    Args:
        module: whose class's forward takes `(E C, D)`.
        stacked: the names of its parameters, all of shape `(E, ..., ...)`.
        experts: E.
    """
    stand_in: Any = copy.copy(module)
    weights = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in module.named_parameters()}
    stand_in._parameters = dict(weights)
    if sorted(stacked) != sorted(weights) or any(True for _ in module.buffers()):
        return False
    each = 7 if experts != 7 else 11
    for width in sorted({size for weight in weights.values() for size in weight.shape[1:]}):
        dtype = next(iter(weights.values())).dtype
        rows = torch.empty(experts * each, width, dtype=dtype, device="meta")
        following = _Following(rows, list(weights.values()), experts, each)
        try:
            with torch.no_grad(), following:
                out = type(module).forward(stand_in, rows)
        except Exception:  # whatever the forward raises for this width, it proves nothing
            out = None
        if following.are_rows(out) and out.shape[0] == len(rows):
            return True
    return False


class _Following(TorchDispatchMode):
    def __init__(self, rows: torch.Tensor, weights: list[torch.Tensor], experts: int, each: int) -> None:
        super().__init__()
        self.experts, self.each = experts, each
        self.rows = {id(rows): rows}
        self.weights = {id(weight): weight for weight in weights}

    def are_rows(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and id(tensor) in self.rows

    def __torch_dispatch__(self, func, types, args: tuple = (), kwargs=None):
        name, out = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if self._keeps_rows(name, args, kwargs or {}, out):
            self.rows |= {id(tensor): tensor for tensor in tree_leaves(out)}
        elif name in ("transpose", "permute") and self._are_weights(args[0], out):
            self.weights[id(out)] = out
        else:
            raise TypeError(f"no rule for {func}")
        return out

    def _keeps_rows(self, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> bool:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "bmm":
            block, weight = tensors
            return self.are_rows(block) and self._blocks(block) and id(weight) in self.weights
        if not tensors or not all(self.are_rows(tensor) for tensor in tensors):
            return False
        if name in ("view", "_unsafe_view", "unsqueeze", "reshape"):
            return self._blocks(out) or out.shape[0] == self.experts * self.each
        if name in _CUTS:
            dim = kwargs.get("dim", args[2] if name != "slice" and len(args) > 2 else args[1] if len(args) > 1 else 0)
            return dim % tensors[0].dim() >= (2 if self._blocks(tensors[0]) else 1)
        if name in ("mul", "add", "sub"):
            numbers = [leaf for leaf in args[1:] if not isinstance(leaf, torch.Tensor)]
            return all(t.shape[:-1] == out.shape[:-1] for t in tensors) and (name == "mul" or not numbers)
        return name in _ZERO_STAYS_ZERO

    def _blocks(self, tensor: torch.Tensor) -> bool:
        return tensor.shape[:2] == (self.experts, self.each) and tensor.dim() > 2

    def _are_weights(self, weight: Any, out: torch.Tensor) -> bool:
        return id(weight) in self.weights and out.shape[0] == self.experts and out.stride(0) == weight.stride(0)
