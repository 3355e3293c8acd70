"""What an operator makes of the tokens that a rank holds: one table, by operator.

A forward is read twice, on whole sequences and on one rank's tokens (`reading.py`). Of every tensor of the second run a
*state* says how it relates to the same tensor of the first::

    None      the same numbers: parameters, constants, whatever has nothing to do with the sequence
    Part      the rank's tokens of it, along one dim
    Sum       a sum over the rank's tokens: those of all ranks add up to it
    Loss      a number whose average over the ranks is it
    Mean      a mean over the rank's labels that are not -100
    Wrong     none of these, and why

An operator of which no rule here says so gives `Wrong`. A rule is about what an operator does with the dim of the
tokens, never about the numbers in it, so that it holds for any choice of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One rank's tokens along `dim`, an index of which is (outer, token, inner), the last running fastest.

    With `uniform`, every number along the dim is the same, so that outer and inner may be anything. With `of`, these
    are not all of the rank's tokens but those that an input of that name marks, in order.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    uniform: bool = False
    of: str = ""


@dataclass(frozen=True)
class Sum:
    labels: str


@dataclass(frozen=True)
class Loss:
    labels: str


@dataclass(frozen=True)
class Mean:
    labels: str


@dataclass(frozen=True)
class Wrong:
    reason: str


State = Part | Sum | Loss | Mean | Wrong | None


class NoRuleError(Exception):
    """What an operator would do with the tokens of a rank; the message ends "... of one rank's tokens"."""


@dataclass
class Operation:
    """A call of an operator in the run on one rank's tokens, beside the same call in the run on whole sequences.

    Attributes:
        name: as in the table.
        given: what it takes, by the names of its schema.
        state: of a tensor.
        labels: the input that a tensor is a view or a cast of, "" if of none.
        outputs: its tensors.
        varying: for each of them, the dims in which it differs from the whole run's.
        changed: names of arguments, sizes among them, that are other numbers than in the whole run.
        tokens: how many the rank has.
        pointwise: whether torch says that it treats every element alike.
        draws: whether torch says that it draws random numbers.
    """

    name: str
    given: dict[str, Any]
    state: Callable[[Any], State]
    labels: Callable[[Any], str]
    outputs: list[torch.Tensor]
    varying: list[list[int]]
    changed: set[str]
    tokens: int
    pointwise: bool
    draws: bool

    def tensors(self) -> list[torch.Tensor]:
        return [t for value in self.given.values() for t in _flat(value)]

    def first(self) -> tuple[torch.Tensor, Part]:
        """The tensor that a rule is about, which holds a rank's tokens."""
        tensor = next(iter(self.tensors()))
        part = self.state(tensor)
        if not isinstance(part, Part) or any(self.state(t) is not None for t in self.tensors()[1:]):
            raise NoRuleError(f"{self.name} with other tensors")
        return tensor, part


def states_after(op: Operation) -> list[State]:
    """The state of each of an operator's outputs."""
    inputs = op.tensors()
    states = [op.state(t) for t in inputs]
    try:
        if op.name in _FILLS:
            return [_filled(op, place) for place in range(len(op.outputs))]
        if wrong := next((s for s in states if isinstance(s, Wrong)), None):
            return [wrong] * len(op.outputs)
        if not any(states):
            return [_made_of_the_same(op, place) for place in range(len(op.outputs))]
        if numbers := [s for s in states if isinstance(s, (Sum, Loss, Mean))]:
            return [_of_a_number(op, numbers)] * len(op.outputs)
        if op.changed - _SIZES.get(op.name, frozenset()):
            raise NoRuleError(f"{op.name} with a number made of their count")
        rule = _RULES.get(op.name) or (_pointwise if op.pointwise else None)
        if rule is None:
            raise NoRuleError(f"{op.name}, for which there is no rule,")
        found = rule(op)
        result = list(found) if isinstance(found, tuple) else [found] * len(op.outputs)
        for state, varying in zip(result, op.varying, strict=True):
            if isinstance(state, Part) and varying != [state.dim]:
                raise NoRuleError(op.name)
    except NoRuleError as error:
        return [Wrong(f"computes {error} of one rank's tokens")] * len(op.outputs)
    return result


def _filled(op: Operation, place: int) -> State:
    """Constants: where their shape goes by the rank's tokens, they are those of the rank's tokens."""
    varying, output = op.varying[place], op.outputs[place]
    if op.changed - {"size", "self"} or len(varying) > 1:
        raise NoRuleError(f"{op.name} with the count")
    if varying:
        return _constant_along(output, varying[0], op.tokens)
    if op.name in _RANDOM:
        return Wrong(f"{DRAWS} ({op.name})")
    return None


DRAWS = "draws a random number, another on each rank"


def _constant_along(output: torch.Tensor, dim: int, tokens: int) -> Part:
    if output.shape[dim] % tokens:
        raise NoRuleError("a constant of another length")
    return Part(dim, uniform=output.shape[dim] != tokens)


def _made_of_the_same(op: Operation, place: int) -> State:
    varying = op.varying[place]
    if op.draws and op.name != "native_dropout":  # which is as random on tokens
        return Wrong(f"{DRAWS} ({op.name})")
    if not varying and not op.changed:
        return None
    if op.name == "expand" and len(varying) == 1:
        return _constant_along(op.outputs[place], varying[0], op.tokens)
    raise NoRuleError(f"{op.name} with the count")


def _of_a_number(op: Operation, numbers: list[Any]) -> State:
    """Losses may be scaled and added; a sum becomes one by the number of labels that it is divided by."""
    tensors = op.tensors()
    others = [t for t in tensors if op.state(t) is None]
    first = op.state(tensors[0])
    if op.name in _IDENTITY or op.name in ("neg",) or (op.name in _REORDER and len(tensors) == 1):
        return first
    if len(numbers) + len(others) < len(tensors):
        raise NoRuleError(f"{op.name} with a sum")
    if op.name in ("div", "div_") and isinstance(first, Sum) and len(numbers) == 1 and others:
        if op.labels(others[0]) == "num_items_in_batch":
            return Loss(first.labels)
        return first
    if op.name in ("mul", "div", "mul_", "div_") and len(numbers) == 1 and first in (None, *numbers):
        if op.name.startswith("div") and first is None:
            raise NoRuleError("the inverse of a sum")
        return numbers[0]
    alike = len(set(numbers)) == 1 and not others and len(numbers) == 2
    if op.name in ("add", "sub", "add_", "sub_") and (alike or all(isinstance(n, Loss) for n in numbers)):
        return numbers[0]
    raise NoRuleError(f"{op.name} with a sum")


# Rules, of tensors of which one at least holds a rank's tokens.


def _pointwise(op: Operation) -> State:
    found: Part | None = None
    for tensor in op.tensors():
        if isinstance(part := op.state(tensor), Part):
            part = replace(part, dim=part.dim - tensor.dim() + op.outputs[0].dim())
            found = _agreed(op, found, part)
    return found


def _agreed(op: Operation, one: Part | None, other: Part) -> Part:
    if one is None:
        return other
    if one.dim == other.dim and (one.uniform or other.uniform or one == other):
        return other if one.uniform else one
    raise NoRuleError(f"{op.name} of tokens at two places")


def _along(op: Operation) -> State:
    """Operators along dims that keep these."""
    tensor, part = op.first()
    _not_along(op, tensor, part)
    return part


def _reduces(op: Operation) -> State:
    """Operators along dims that drop these, or keep one element."""
    tensor, part = op.first()
    dims = _not_along(op, tensor, part)
    return part if op.given.get("keepdim") else replace(part, dim=part.dim - sum(d < part.dim for d in dims))


def _not_along(op: Operation, tensor: torch.Tensor, part: Part) -> list[int]:
    dims = op.given.get("dim", op.given.get("dims"))
    dims = [dims] if isinstance(dims, int) else list(dims or range(tensor.dim()))
    dims = [d % tensor.dim() for d in dims]
    if part.dim in dims:
        raise NoRuleError(f"{op.name} along the sequence")
    return dims


def _norm(op: Operation) -> State:
    tensor = op.given["input"]
    part = op.state(tensor)
    if not isinstance(part, Part) or part.dim >= tensor.dim() - len(op.given["normalized_shape"]):
        raise NoRuleError(f"{op.name} along the sequence")
    return part


def _product(left: str, right: str, added: str | None = None) -> Callable[[Operation], State]:
    def rule(op: Operation) -> State:
        a, b = op.given[left], op.given[right]
        result = _of_product(op, a, op.state(a), b, op.state(b))
        bias = op.given.get(added) if added else None
        if bias is not None and isinstance(part := op.state(bias), Part):
            result = _agreed(op, result, replace(part, dim=part.dim - bias.dim() + op.outputs[0].dim()))
        return result

    return rule


def _of_product(op: Operation, a: Any, rows: State, b: Any, columns: State) -> Part:
    inner_a, inner_b = a.dim() - 1, max(b.dim() - 2, 0)
    if isinstance(rows, Part) and isinstance(columns, Part):
        if rows.dim == columns.dim and rows.dim < min(inner_a - 1, inner_b):
            return _agreed(op, rows, columns)
        raise NoRuleError(f"{op.name} of tokens with tokens")
    if isinstance(rows, Part) and rows.dim < inner_a:
        return rows
    if isinstance(columns, Part) and columns.dim == b.dim() - 1 and b.dim() > 1:
        return columns
    raise NoRuleError(f"{op.name}, a sum along the sequence,")


def _linear(op: Operation) -> State:
    tensor, part = op.given["input"], op.state(op.given["input"])
    if not isinstance(part, Part) or part.dim == tensor.dim() - 1:
        raise NoRuleError("linear along the sequence")
    return part


def _reshaped(op: Operation) -> State:
    """A change of shape that keeps the order of elements; those before and after a token stay before and after it."""
    tensor, part = op.first()
    return tuple(  # type: ignore[return-value]
        _part_of_shape(op, tensor, part, output, varying)
        for output, varying in zip(op.outputs, op.varying, strict=True)
    )


def _part_of_shape(op: Operation, tensor: torch.Tensor, part: Part, output: torch.Tensor, varying: list[int]) -> Part:
    if len(varying) != 1:
        raise NoRuleError(f"{op.name} to {tuple(output.shape)}")
    dim = varying[0]
    if part.uniform:
        # What runs along the new dim must run along the old one alone: others need not be the same.
        step, within = math.prod(tensor.shape[part.dim + 1 :]), math.prod(output.shape[dim + 1 :])
        if within % step or step * tensor.shape[part.dim] % (within * output.shape[dim]):
            raise NoRuleError(f"{op.name} from {tuple(tensor.shape)} to {tuple(output.shape)}, which mixes dims,")
        return replace(part, dim=dim)
    if part.of:
        raise NoRuleError(f"{op.name} of some tokens")
    before = math.prod(tensor.shape[: part.dim]) * part.outer
    after = math.prod(tensor.shape[part.dim + 1 :]) * part.inner
    outside, within = math.prod(output.shape[:dim]), math.prod(output.shape[dim + 1 :])
    if before % outside or after % within or output.shape[dim] != before // outside * op.tokens * (after // within):
        raise NoRuleError(f"{op.name} from {tuple(tensor.shape)} to {tuple(output.shape)}, which mixes dims,")
    return Part(dim, before // outside, after // within)


def _permuted(op: Operation) -> State:
    tensor, part = op.first()
    order = list(range(tensor.dim()))
    if op.name == "permute":
        order = [d % tensor.dim() for d in op.given["dims"]]
    else:
        one, two = (0, 1) if op.name in ("t", "t_") else (op.given["dim0"], op.given["dim1"])
        if tensor.dim() > 1:
            order[one], order[two] = order[two], order[one]
    return replace(part, dim=order.index(part.dim))


def _expanded(op: Operation) -> State:
    tensor, part = op.first()
    return replace(part, dim=part.dim + op.outputs[0].dim() - tensor.dim())


def _repeated(op: Operation) -> State:
    tensor, part = op.first()
    dim = part.dim + len(op.given["repeats"]) - tensor.dim()
    return replace(part, dim=dim, outer=part.outer * op.given["repeats"][dim])


def _sliced(op: Operation) -> State:
    tensor, part = op.first()
    dim = op.given["dim"] % tensor.dim()
    if dim == part.dim and (op.outputs[0].shape[dim] != tensor.shape[dim] or op.given["step"] != 1):
        raise NoRuleError(f"{op.name} of some tokens")
    return part


def _picked(op: Operation) -> State:
    """select and unbind: one index along a dim."""
    tensor, part = op.first()
    dim = op.given["dim"] % tensor.dim()
    if dim == part.dim:
        raise NoRuleError(f"{op.name} of one token")
    return replace(part, dim=part.dim - (dim < part.dim))


def _joined(op: Operation) -> State:
    found: Part | None = None
    for tensor in op.given["tensors"]:
        part = op.state(tensor)
        if tensor.numel() and not isinstance(part, Part):  # an empty cache adds nothing
            raise NoRuleError(f"{op.name} with what is whole")
        found = _agreed(op, found, part) if isinstance(part, Part) else found
    dim = op.given["dim"] % op.outputs[0].dim()
    if found is not None and op.name == "stack":
        return replace(found, dim=found.dim + (dim <= found.dim))
    if found is None or (dim == found.dim and sum(tensor.numel() > 0 for tensor in op.given["tensors"]) > 1):
        raise NoRuleError("cat along the sequence")
    return found


def _padded(op: Operation) -> State:
    tensor, part = op.first()
    pad = op.given["pad"]
    if any(pad[2 * (tensor.dim() - 1 - part.dim) :][:2]):
        raise NoRuleError(f"{op.name}, a shift,")
    return part


def _looked_up(op: Operation) -> State:
    part = op.state(op.given["indices"])
    if op.state(op.given["weight"]) is not None or not isinstance(part, Part):
        raise NoRuleError(op.name)
    return part


def _by_position(op: Operation) -> State:
    """gather and scatter: every operand holds the same tokens, and positions are in another dim."""
    tensors = op.tensors()
    found: Part | None = None
    for tensor in tensors:
        part = op.state(tensor)
        if not isinstance(part, Part) or op.given["dim"] % tensors[0].dim() == part.dim:
            raise NoRuleError(f"{op.name} along the sequence")
        found = _agreed(op, found, part)
    return found


def _marked(op: Operation) -> str:
    """The input that marks tokens `(B, S)` of a tensor `(B, S, ...)`, where that is what an index does; else ""."""
    tensor, indices = op.given["self"], op.given["indices"]
    tokens = indices[0] is not None and indices[0].dtype is torch.bool and not any(x is not None for x in indices[1:])
    alike = tokens and op.state(indices[0]) == op.state(tensor) == Part(1) and indices[0].dim() == 2
    return op.labels(indices[0]) if alike else ""


def _put(op: Operation) -> State:
    values = op.state(op.given["values"])
    if not (name := _marked(op)) or values not in (None, Part(0, of=name)) or op.given["accumulate"]:
        raise NoRuleError(op.name)
    return Part(1)


def _indexed(op: Operation) -> State:
    tensor, indices = op.given["self"], op.given["indices"]
    if name := _marked(op):
        return Part(0, of=name)
    used = [place for place, index in enumerate(indices) if index is not None]
    picked = [indices[place] for place in used]
    if any(index.dtype in (torch.bool, torch.uint8) for index in picked) or used != list(range(used[0], used[-1] + 1)):
        raise NoRuleError(f"{op.name} by a mask")
    width = max(index.dim() for index in picked)
    part = op.state(tensor)
    if isinstance(part, Part):
        if any(op.state(index) is not None for index in picked) or part.dim in used:
            raise NoRuleError(f"{op.name}, a choice of tokens,")
        return replace(part, dim=part.dim if part.dim < used[0] else part.dim - len(used) + width)
    found: Part | None = None
    for index in picked:
        if isinstance(at := op.state(index), Part):
            at = replace(at, dim=used[0] + width - index.dim() + at.dim)
            found = _agreed(op, found, at)
    return found


def _index_selected(op: Operation) -> State:
    tensor, index = op.given["self"], op.given["index"]
    part, at, dim = op.state(tensor), op.state(index), op.given["dim"] % tensor.dim()
    if isinstance(part, Part) and at is None and dim != part.dim:
        return part
    if part is None and isinstance(at, Part):
        return replace(at, dim=dim)
    raise NoRuleError(f"{op.name}, a choice of tokens,")


def _triangle(op: Operation) -> State:
    tensor, part = op.first()
    if part.dim >= tensor.dim() - 2:
        raise NoRuleError(f"{op.name} along the sequence")
    return part


def _along_all_but_last(op: Operation) -> State:
    tensor, part = op.first()
    if part.dim == tensor.dim() - 1 and op.name == "view_as_complex":
        raise NoRuleError(op.name)
    return part


def _convolved(op: Operation) -> State:
    _, part = op.first()
    if part.dim != 0:
        raise NoRuleError("convolution along the sequence")
    return part


def _negative_log_likelihood(op: Operation) -> State:
    scores, target = op.given["self"], op.given["target"]
    part, at = op.state(scores), op.state(target)
    if not isinstance(part, Part) or not isinstance(at, Part) or op.given["weight"] is not None:
        raise NoRuleError("a loss with weights or with what is whole")
    if part.dim == 1 or replace(at, dim=part.dim) != part:  # dim 1 has the classes
        raise NoRuleError("a loss over the sequence")
    labels = op.labels(target)
    if op.given["reduction"] == 2 and labels:
        return Sum(labels), Sum(labels)  # type: ignore[return-value]
    if op.given["reduction"] == 1 and labels and op.given["ignore_index"] == -100:
        return Mean(labels), Wrong("counts its labels")  # type: ignore[return-value]
    raise NoRuleError("a loss of labels that it changes, or of each token,")


_FILLS = {
    f"{kind}{form}"
    for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
    for form in ("", "_like")
} | {f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")} | {"empty_strided"}  # fmt: skip
_RANDOM = {f"{kind}{form}" for kind in ("rand", "randn", "randint") for form in ("", "_like")}
_IDENTITY = {"clone", "_to_copy", "detach", "alias", "lift_fresh"}
_REORDER = {"view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze", "squeeze_", "unsqueeze_", "flatten"}
IDENTITIES = _IDENTITY | _REORDER | {"slice", "expand"}
# Arguments that are sizes or bounds: the rule looks at shapes instead.
_SIZES = {
    "view": {"size"}, "_unsafe_view": {"size"}, "_reshape_alias": {"size", "stride"}, "expand": {"size"},
    "slice": {"start", "end"}, "split_with_sizes": {"split_sizes"}, "constant_pad_nd": set(), "reshape": {"shape"},
}  # fmt: skip
_ELEMENTWISE = (
    "copy_ masked_fill masked_fill_ where native_dropout bernoulli_ bernoulli fill_ zero_ clone _to_copy detach alias "
    "lift_fresh mul add sub div neg polar"
)
_KEEP = "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod sort topk flip roll glu logcumsumexp"
_DROP = (
    "sum mean amax amin var std prod logsumexp any all argmax argmin max min linalg_vector_norm norm median "
    "count_nonzero var_mean"
)
_RULES: dict[str, Callable[[Operation], Any]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _pointwise),
    **dict.fromkeys(_KEEP.split(), _along),
    **dict.fromkeys(_DROP.split(), _reduces),
    **dict.fromkeys(_REORDER, _reshaped),
    **dict.fromkeys(("permute", "transpose", "t", "transpose_", "t_"), _permuted),
    **dict.fromkeys(("select", "unbind"), _picked),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _along_all_but_last),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split"), _along),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("gather", "scatter", "scatter_", "scatter_add", "scatter_add_"), _by_position),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm"), _norm),
    **dict.fromkeys(("tril", "triu", "tril_", "triu_"), _triangle),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _negative_log_likelihood),
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "addmm": _product("mat1", "mat2", "self"),
    "baddbmm": _product("batch1", "batch2", "self"),
    "mv": _product("self", "vec"),
    "linear": _linear,
    "expand": _expanded,
    "repeat": _repeated,
    "slice": _sliced,
    "constant_pad_nd": _padded,
    "embedding": _looked_up,
    "index": _indexed,
    **dict.fromkeys(("index_put", "index_put_"), _put),
    "index_select": _index_selected,
    "convolution": _convolved,
}


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _flat(item)] if isinstance(value, (tuple, list)) else []
