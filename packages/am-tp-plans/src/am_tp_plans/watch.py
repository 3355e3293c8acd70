"""Watch the operators of a model's forward on one rank's share, and say what would be wrong on the ranks together.

Two kinds of share are followed through the operators. A tensor with a rank's *features* came out of a colwise layer:
its last dim is the sharded one until a change of shape hides it. A tensor with a rank's *tokens* holds its part of the
sequence: only what treats every token alike may touch it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

_REDUCTIONS = ("mean", "sum", "var", "std", "amax", "amin", "max", "min", "_softmax", "norm", "topk", "sort", "cumsum")
_RESHAPES = ("view", "reshape", "_unsafe_view")
# The position of the dim among the arguments of operators that split a tensor.
_TAKES_APART = {"split": 2, "split_with_sizes": 2, "chunk": 2, "slice": 1, "select": 1, "unbind": 1}
_LOSES_PLACES = (*_RESHAPES, "permute", "transpose", "t", "mm", "bmm", "addmm", "unflatten")
_NORMS = ("native_layer_norm", "_fused_rms_norm")
_KEEPS_SHAPE = ("alias", "detach", "clone", "_to_copy", "dropout", "native_dropout")
# The positions of the factors among the arguments of matrix products.
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
_FRESH = ("empty_like", "zeros_like", "ones_like", "full_like", "sym_size", "sym_stride", "new_zeros", "new_ones")


@dataclass(frozen=True)
class Collective:
    """What a style communicates once.

    `elements` are those of the whole tensor, before a scatter or after a gather; of an all-to-all those that the
    busiest rank sends to others.
    """

    module: str
    phase: str  # forward or backward
    kind: str  # all-reduce, all-gather, reduce-scatter or all-to-all
    elements: int
    of_tokens: bool  # whether the elements grow with the tokens


class ReadDirectlyError(Exception):
    """A parameter that a style shards is read by code outside its own module."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"{parameter} is read outside its own module, so it cannot be sharded")
        self.parameter = parameter


class WrongError(Exception):
    """What the ranks would compute is not what one process computes."""


class Watch(TorchDispatchMode):
    """Which tensors hold a rank's share, and which parameters were computed with them."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters  # held, so that no other tensor gets the identity of one
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.active: Any = WeakIdKeyDictionary()  # tensors that depend on the batch
        self.trained: Any = WeakIdKeyDictionary()  # tensors that a gradient goes through
        self.marks: Any = WeakIdKeyDictionary()  # a rank's features -> their number, 0 after a change of shape
        self.packed: Any = WeakIdKeyDictionary()  # fused features -> a rank's widths of the projections in them
        self.tokens: Any = WeakIdKeyDictionary()  # a rank's tokens -> their dim
        self.shared: Any = WeakIdKeyDictionary()  # what only colwise projections may read -> the block's name
        self.placed: Any = WeakIdKeyDictionary()  # whole activations whose gradient is summed where they were gathered
        self.outputs: Any = WeakIdKeyDictionary()  # what a sum over the ranks returned -> the module's name
        self.sources: Any = WeakIdKeyDictionary()  # a tensor made of parameters and constants -> the parameters' names
        self.sharded: set[str] = set()  # parameters that a style shards: only their own module may read them
        self.summed: set[str] = set()  # parameters whose gradients a style sums
        self.partial: set[str] = set()  # parameters that met a share
        self.ran: set[str] = set()  # modules with a style that ran
        self.modified: set[str] = set()  # modules with a style whose output is modified in place
        self.reshaped: list[tuple[int, int]] = []  # last dims of sharded features before and after a change of shape
        self.pieces: list[list[int]] = []  # what fused features were taken apart into
        self.traffic: list[Collective] = []
        self.met: list[tuple[str, Any]] = []  # numbers and constants that elementwise operators met a share with

    def is_sharded(self, tensor: torch.Tensor) -> bool:
        return tensor in self.marks

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        self.marks[tensor] = tensor.shape[-1]
        return self.activate(tensor)

    def activate(self, tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        self.active[tensor] = True
        self.trained[tensor] = True
        if name:
            self.outputs[tensor] = name
        return tensor

    def sends(self, module: str, phase: str, kind: str, elements: int, of_tokens: bool = True) -> None:
        self.traffic.append(Collective(module, phase, kind, elements, of_tokens))

    def part(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        self.tokens[tensor] = dim
        return self.activate(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.is_mutable and args and id(args[0]) in self.names:
            return args[0]  # a model that rescales its own weights; here they share one number
        function, name = func, func._schema.name.removeprefix("aten::")
        output = _product(name, args) if name in _PRODUCTS else None
        if output is None:
            output = func(*args, **(kwargs or {}))
        inputs = list(tensors((args, kwargs or {})))
        names = set().union(*(self._sources(tensor) for tensor in inputs)) if inputs else set()
        if read := sorted(names & self.sharded):
            raise ReadDirectlyError(read[0])
        if read := [self.shared[tensor] for tensor in inputs if tensor in self.shared]:
            raise WrongError(f"{read[0]} computes {name} of the input that its projections share")
        marked = [tensor for tensor in inputs if tensor in self.marks]
        parts = [tensor for tensor in inputs if tensor in self.tokens]
        if function._schema.is_mutable and inputs and inputs[0] in self.outputs:
            self.modified.add(self.outputs[inputs[0]])
        if marked or parts:
            self.partial |= names
            self._refuse_company(name, inputs, marked, parts)
            self._note_company(function, name, args, inputs)
        if marked:
            self._refuse_reduction(name, args, marked[0])
            if marked[0] in self.packed:
                self._take_apart(name, args, marked[0], output)
            else:
                self._refuse_taking_apart(name, args, marked[0])
            if self.marks[marked[0]] and name in _RESHAPES:
                self.reshaped.append((marked[0].shape[-1], output.shape[-1]))
        if parts and name not in _FRESH:
            self._follow_tokens(function, name, args, parts, output)
        trained = bool(names - self.summed) or any(tensor in self.trained for tensor in inputs)
        widths = {self.marks[tensor] for tensor in marked}
        depends = marked or any(tensor in self.active for tensor in inputs)
        for tensor in tensors(output):
            if inputs and inputs[0] in self.placed:
                self.placed[tensor] = self.placed[inputs[0]]
            if marked:
                kept = tensor.dim() > 0 and tensor.shape[-1] in widths and name not in _LOSES_PLACES
                self.marks[tensor] = tensor.shape[-1] if kept else 0
            if depends:
                self.active[tensor] = True
                if trained and tensor.is_floating_point():
                    self.trained[tensor] = True
            elif names:
                self.sources[tensor] = names
        return output

    def _refuse_company(self, name: str, inputs: list, marked: list, parts: list) -> None:
        if marked and parts:
            raise WrongError(f"it computes {name} of one rank's features and one rank's tokens")
        if whole := [t for t in inputs if t not in self.marks and t not in self.tokens and t in self.trained]:
            whole = [t for t in whole if t.is_floating_point()]
        if whole:
            what = "one rank's share" if marked else "one rank's tokens"
            raise WrongError(
                f"it computes {name} of {what} and a whole activation of shape {tuple(whole[0].shape)}, whose "
                "gradient would be a part of a sum"
            )

    def _note_company(self, function: Any, name: str, args: tuple, inputs: list[torch.Tensor]) -> None:
        """A constant per head or token, or a number made of how many there are, would be another one on each rank."""
        if torch.Tag.pointwise not in function.tags or name in ("clone", "_to_copy"):
            return
        met: list[Any] = [arg for arg in args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
        for tensor in inputs:
            if tensor in self.marks or tensor in self.tokens or tensor in self.active or id(tensor) in self.names:
                continue
            same = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
            met.append("a constant" if same else tuple(tensor.shape))
        self.met.append((name, met))

    def _refuse_reduction(self, name: str, args: tuple, tensor: torch.Tensor) -> None:
        if name not in _REDUCTIONS or not self.marks[tensor] or args[0] is not tensor:
            return
        dims = _dims(args, tensor)
        if dims is None or tensor.dim() - 1 in dims:
            raise WrongError(
                f"it takes the {name} over features of which each rank has a share ({tuple(tensor.shape)})"
            )

    def _refuse_taking_apart(self, name: str, args: tuple, tensor: torch.Tensor) -> None:
        """A rank's share of fused features is not the same share of each of them."""
        if name not in _TAKES_APART or not self.marks[tensor] or args[0] is not tensor:
            return
        dim = args[_TAKES_APART[name]] if len(args) > _TAKES_APART[name] else 0
        if dim % tensor.dim() == tensor.dim() - 1 and not (name == "slice" and _takes_all(args, tensor)):
            raise WrongError(f"it takes apart ({name}) features of which each rank has a share {tuple(tensor.shape)}")

    def _take_apart(self, name: str, args: tuple, tensor: torch.Tensor, output: Any) -> None:
        """Fused features may be split into their projections; what does not split them leaves them fused."""
        widths, width = self.packed[tensor], tensor.shape[-1]
        pieces = list(tensors(output))
        if name in _TAKES_APART and pieces[0].shape[:-1] == tensor.shape[:-1]:
            start = args[2] if name == "slice" and len(args) > 2 and args[2] else 0
            sizes = [piece.shape[-1] for piece in pieces]
            self.pieces.append([start % width, *sizes])
            bounds = list(accumulate(widths, initial=0))
            edges = list(accumulate(sizes, initial=start % width))
            if not set(edges) <= set(bounds):
                raise WrongError(f"it takes fused features {widths} apart at {edges}")
            for piece, begin, end in zip(pieces, edges, edges[1:], strict=False):
                inside = widths[bounds.index(begin) : bounds.index(end)]
                if len(inside) > 1:
                    self.packed[piece] = inside
        elif name in _RESHAPES and pieces[0].shape[: tensor.dim()] == (*tensor.shape[:-1], len(widths)):
            if len(set(widths)) > 1:
                raise WrongError(f"it reshapes fused features {widths} to {tuple(pieces[0].shape)}")
        elif all(piece.shape == tensor.shape for piece in pieces):
            for piece in pieces:
                self.packed[piece] = widths
        else:
            raise WrongError(f"it computes {name} of fused features {widths}")

    def _follow_tokens(self, function: Any, name: str, args: tuple, parts: list, output: Any) -> None:
        """Where the tokens are in the output, for operators that treat every token alike; the others are refused."""
        tensor, pieces = parts[0], list(tensors(output))
        places = {part.dim() - self.tokens[part] for part in parts}
        if (torch.Tag.pointwise in function.tags or name in _KEEPS_SHAPE) and len(places) == 1:
            follows = pieces[0].dim() - places.pop()
        else:
            follows = _place_after(name, args, parts, self.tokens[tensor], pieces)
        if follows is None:
            raise WrongError(f"it computes {name} of one rank's tokens {tuple(tensor.shape)}")
        for piece in pieces:
            if piece.dim() > follows:
                self.tokens[piece] = follows

    def _sources(self, tensor: torch.Tensor) -> set[str]:
        return {self.names[id(tensor)]} if id(tensor) in self.names else self.sources.get(tensor, set())


def _place_after(name: str, args: tuple, parts: list, dim: int, pieces: list) -> int | None:
    """The dim of the tokens after an operator that is not elementwise, None if it may mix them."""
    tensor, shape = parts[0], parts[0].shape
    out = pieces[0].shape if pieces else torch.Size()
    before = out[: dim + 1] == shape[: dim + 1]
    if name in _RESHAPES and not before:
        flattened = len(out) > 0 and out[0] == math.prod(shape[: dim + 1]) and out[1:] == shape[dim + 1 :]
        restored = dim == 0 and len(out) > 2 and math.prod(out[:2]) == shape[0]
        return 0 if flattened else 1 if restored else None
    if name in ("mm", "addmm"):
        return 0 if dim == 0 and args[int(name == "addmm")] is tensor and len(parts) == 1 else None
    if name in _NORMS:
        return dim if dim < len(shape) - len(args[1]) else None
    if name in _REDUCTIONS:
        dims = _dims(args, tensor)
        return dim if dims and min(dims) > dim else None
    if name in _TAKES_APART:
        along = args[_TAKES_APART[name]] if len(args) > _TAKES_APART[name] else 0
        return dim if along % len(shape) > dim or out == shape else None
    if name == "cat" and len(parts) != len(args[0]):
        return None
    return dim if before and name in (*_RESHAPES, "unsqueeze", "squeeze", "expand", "cat") else None


def _product(name: str, args: tuple) -> torch.Tensor | None:
    """Something of the shape of a product with weights that share one number: what is in it does not matter."""
    left, right = (args[position] for position in _PRODUCTS[name])
    fits = left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-2]
    fits = fits and all(bias.shape[-1] == right.shape[-1] for bias in args[: _PRODUCTS[name][0]])
    if not fits or all(any(factor.stride()) for factor in (left, right)):
        return None  # computed, or refused, by the operator itself
    return left.new_ones(*left.shape[:-1], right.shape[-1])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _dims(args: tuple, tensor: torch.Tensor) -> list[int] | None:
    """The dims that a reduction goes over, None for all of them."""
    dims = args[1] if len(args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    return [dim % tensor.dim() for dim in dims] if isinstance(dims, (list, tuple)) and dims else None


def _takes_all(args: tuple, tensor: torch.Tensor) -> bool:
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    end = args[3] if len(args) > 3 and args[3] is not None else tensor.shape[-1]
    return start == 0 and end >= tensor.shape[-1] and (len(args) < 5 or args[4] == 1)
