"""Where a rank's share is after an operator: one record per tensor, one table of rules by operator.

A share is a dim of which each of n ranks holds a part. Fused projections are several parts in one dim, and a rank
holds its n-th of each of them. All numbers here are those of the whole tensor::

    c_attn(x)  (B, S, 3 * heads * D)    dim 2, parts (heads * D, heads * D, heads * D)
    view       (B, S, 3, heads, D)      dim 3, parts (heads,)
    view       (B, S, 3 * heads, D)     dim 2, parts (heads, heads, heads)

Where heads for keys are fewer than the ranks, neighbouring ranks hold a copy of one, until each repeats it for its own
query heads; 2 heads that 8 query heads read, on 4 ranks::

    k_proj(x)  (B, S, 2 * D)            dim 2, parts (2 * D,), 2 copies
    expand     (B, 2, 4, S, D)          dim 1, parts (2,), 2 copies; dim 2 is alike, and a rank needs but 2 of the 4
    reshape    (B, 8, S, D)             dim 1, parts (8,)

A rule says where the share is in the output. It reads the whole model's operator; that the operator on a rank's share
has these sizes is compared afterwards, dim by dim (`watch.py`). Nothing is known of an operator without a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

FEATURES, TOKENS = "features", "tokens"


class WrongError(Exception):
    """What the ranks would compute is not what one process computes, or no rule says that it is."""


@dataclass(frozen=True)
class Share:
    """The dim of a tensor of which a rank holds a part.

    Attributes:
        dim: not negative.
        kind: `FEATURES` (columns, heads) or `TOKENS`.
        parts: the whole widths in this dim of which a rank holds its n-th each; one, or those of fused projections.
        copies: how many neighbouring ranks hold the same.
    """

    dim: int
    kind: str
    parts: tuple[int, ...]
    copies: int = 1

    @property
    def what(self) -> str:
        copied = f" that {self.copies} ranks hold" if self.copies > 1 else ""
        return (f"fused features {list(self.parts)}" if len(self.parts) > 1 else self.kind) + copied

    def held(self, size: int, ranks: int) -> int:
        """How much of a whole size one of so many ranks has."""
        return size * self.copies // ranks


@dataclass(frozen=True)
class Call:
    """One operator of the whole model.

    Attributes:
        name: of the operator.
        arguments: by the operator's own names, defaults included.
        inputs: the tensors in the arguments.
        outputs: the tensors that it returned.
        ranks: size of the axis.
        share: of a tensor, or None.
        alike: the dims of a tensor along which all its values are the same.
    """

    name: str
    arguments: dict[str, Any]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    ranks: int
    share: Callable[[torch.Tensor], Share | None]
    alike: Callable[[torch.Tensor], frozenset[int]]


Rule = Callable[[Call], "Share | list[Share | None] | None"]


def shares_after(call: Call, pointwise: bool) -> list[Share | None]:
    """The share of each output of an operator that a share goes into.

    Raises:
        WrongError: the ranks together would compute something else, or there is no rule for the operator.
    """
    rule = RULES.get(call.name.rstrip("_") or call.name, _elementwise if pointwise else None)
    if rule is None:
        tensor, share = next((t, s) for t in call.inputs if (s := call.share(t)))
        raise WrongError(f"it computes {call.name} of one rank's {share.what} {tuple(tensor.shape)}, which has no rule")
    after = rule(call)
    if isinstance(after, list):
        return after
    return [after if after and output.dim() > after.dim else None for output in call.outputs]


def alike_after(call: Call, pointwise: bool) -> frozenset[int]:
    """The dims of the first output along which all values are the same, whatever the size."""
    output = call.outputs[0]
    if call.name in CONSTANTS:
        return frozenset(range(output.dim()))
    if pointwise or call.name in ("where", "_to_copy"):
        return frozenset(d for d in range(output.dim()) if all(_same_along(call, t, d, output) for t in call.inputs))
    if call.name not in MOVES or len(call.inputs) != 1:
        return frozenset()
    (tensor,) = call.inputs
    found = set()
    for dim in call.alike(tensor):
        share = Share(dim, FEATURES, (tensor.shape[dim],))
        pretended = replace(call, share=lambda t, s=share: s if t is tensor else None)
        try:
            after = RULES[call.name](pretended)
        except WrongError:
            continue
        found |= {s.dim for s in (after if isinstance(after, list) else [after])[:1] if s}
    if call.name == "expand":
        shift = output.dim() - tensor.dim()
        found |= set(range(shift)) | {shift + d for d, size in enumerate(tensor.shape) if size == 1}
    return frozenset(found)


def dims_added_up(call: Call, tensor: torch.Tensor) -> frozenset[int]:
    """The dims of an input that an operator adds up or orders: how many alike values there are changes the result."""
    name, rank = call.name.rstrip("_") or call.name, tensor.dim()
    if name in _FACTORS:
        left, right = (call.arguments[factor] for factor in _FACTORS[name])
        return frozenset([rank - 1] * (tensor is left) + [rank - 2] * (tensor is right))
    if name in _ATTENTION.split():
        return frozenset(range(rank - 2, rank))
    if name in _REDUCTIONS.split() or name in _ALONG.split():
        dims = _normalized(next((call.arguments[n] for n in ("dim", "dims") if n in call.arguments), None), rank)
        return frozenset(dims or range(rank))
    if name in ("native_layer_norm", "_fused_rms_norm"):
        return frozenset(range(rank - len(call.arguments["normalized_shape"]), rank))
    return frozenset(range(rank)) if name in ("convolution", "scatter_add", "unfold") else frozenset()


def _same_along(call: Call, tensor: torch.Tensor, dim: int, output: torch.Tensor) -> bool:
    own = dim - output.dim() + tensor.dim()
    return own < 0 or tensor.shape[own] == 1 or own in call.alike(tensor)


def _first(call: Call) -> tuple[torch.Tensor, Share]:
    """The only input that has a share."""
    (found,) = [(t, s) for t in call.inputs if (s := call.share(t))]
    return found


def _elementwise(call: Call) -> Share:
    """Every input has the same share, or has nothing of its own along its dim."""
    return _aligned(call, call.inputs, call.outputs[0].dim())


def _aligned(call: Call, inputs: list[torch.Tensor], rank: int) -> Share:
    """The share of tensors whose dims are matched from the last one backwards."""
    found: dict[Share, torch.Tensor] = {}
    for tensor in inputs:
        if share := call.share(tensor):
            found.setdefault(replace(share, dim=share.dim - tensor.dim()), tensor)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise WrongError(
            f"it computes {call.name} of one rank's {one.what} {tuple(first.shape)} and one rank's {other.what} "
            f"{tuple(second.shape)}"
        )
    share, of = next(iter(found.items()))
    for tensor in inputs:
        own = tensor.dim() + share.dim
        if call.share(tensor) or own < 0 or tensor.shape[own] == 1 or own in call.alike(tensor):
            continue
        raise WrongError(
            f"it computes {call.name} of one rank's {share.what} {tuple(of.shape)} and a whole tensor "
            f"{tuple(tensor.shape)}, which has values for all of them"
        )
    return replace(share, dim=rank + share.dim)


def _written(call: Call) -> Share:
    """A copy into the first argument."""
    target, source = call.inputs[:2]
    return _aligned(call, [target, source], target.dim())


def _normalized(dims: Any, rank: int) -> list[int]:
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return [dim % rank for dim in dims] if rank else []


def _over(call: Call, tensor: torch.Tensor, share: Share) -> WrongError:
    return WrongError(
        f"it takes the {call.name} over {share.what} of which each rank has a share ({tuple(tensor.shape)})"
    )


def _reduction(call: Call) -> Share:
    """A reduction over other dims."""
    tensor, share = _first(call)
    dims = _normalized(call.arguments.get("dim"), tensor.dim())
    if not dims or share.dim in dims:
        raise _over(call, tensor, share)
    gone = 0 if call.arguments.get("keepdim") else sum(dim < share.dim for dim in set(dims))
    return replace(share, dim=share.dim - gone)


def _along(*names: str) -> Rule:
    """An operator that mixes values along some dims, named by an argument, and leaves the others where they are."""

    def rule(call: Call) -> Share:
        tensor, share = _first(call)
        dims = _normalized(next((call.arguments[n] for n in names if n in call.arguments), None), tensor.dim())
        if not dims or share.dim in dims:
            raise _over(call, tensor, share)
        return share

    return rule


def _glu(call: Call) -> Share:
    """Half of a dim gates the other half: fused halves gate each other on every rank."""
    tensor, share = _first(call)
    half = len(share.parts) // 2
    if share.dim != call.arguments["dim"] % tensor.dim():
        return share
    if share.parts[:half] != share.parts[half:]:
        raise _over(call, tensor, share)
    return replace(share, parts=share.parts[:half])


def _last(count: int) -> Rule:
    """An operator over the last dims."""

    def rule(call: Call) -> Share:
        tensor, share = _first(call)
        if share.dim >= tensor.dim() - count:
            raise _over(call, tensor, share)
        return share

    return rule


def _norm(call: Call) -> Share:
    tensor, share = _first(call)
    if tensor is not call.inputs[0] or share.dim >= tensor.dim() - len(call.arguments["normalized_shape"]):
        raise _over(call, tensor, share)
    return share


def _pad(call: Call) -> Share:
    tensor, share = _first(call)
    pad = call.arguments["pad"]
    place = 2 * (tensor.dim() - 1 - share.dim)
    if any(pad[place : place + 2]):
        raise _over(call, tensor, share)
    return share


def _product(call: Call) -> Share:
    """`(M, K) @ (K, N)` or `(B, M, K) @ (B, K, N)`: rows, columns or the batch may be shares, not what is summed."""
    left, right = (call.arguments[name] for name in _FACTORS[call.name])
    one, other = call.share(left), call.share(right)
    last = left.dim() - 1
    for share, summed in ((one, last), (other, last - 1)):
        if share and share.dim == summed:
            raise WrongError(f"it sums, in {call.name}, over {share.what} of which each rank has a share")
    batch = last == 2 and any(share and share.dim == 0 for share in (one, other))
    if one and other and not (batch and one == other):
        raise WrongError(f"it computes {call.name} of one rank's {one.what} and one rank's {other.what}")
    if batch and one != other:
        whole = right if one else left
        if 0 not in call.alike(whole) and whole.shape[0] != 1:
            raise WrongError(f"it computes {call.name} of one rank's share and a whole tensor {tuple(whole.shape)}")
    share = one or other
    added = [tensor for tensor in (call.arguments["self"],) if tensor is not left]
    if share is None:  # only what is added has one
        raise WrongError(f"it adds one rank's share to a whole product ({call.name})")
    for bias in added:
        own = share.dim - call.outputs[0].dim() + bias.dim()
        theirs = call.share(bias)
        nothing = own < 0 or bias.shape[own] == 1 or own in call.alike(bias)
        if theirs != replace(share, dim=own) if theirs else not nothing:
            raise WrongError(f"it adds a tensor {tuple(bias.shape)} to one rank's {share.what} ({call.name})")
    return share


_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}


def _attention(call: Call) -> Share:
    """Query `(B, H, S, E)`, key and value `(B, H_kv, S, E)`: whole sequences and whole groups of heads per rank."""
    query, mask = call.arguments["query"], call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    share = call.share(query)
    if share is None or share.dim > 1:
        what = share.what if share else "share"
        raise WrongError(f"it computes attention ({call.name}) over one rank's {what} {tuple(query.shape)}")
    for name in ("key", "value"):
        tensor = call.arguments[name]
        theirs = call.share(tensor)
        grouped = theirs and share.dim == 1 and len(share.parts) == len(theirs.parts) == 1
        grouped = grouped and (theirs.copies == share.copies or _one_per_rank(theirs, tensor, call.ranks))
        same = theirs == share or (grouped and theirs.dim == 1 and share.parts[0] % theirs.parts[0] == 0)
        if not same and not (theirs is None and tensor.shape[share.dim] == 1):
            raise WrongError(f"it computes attention ({call.name}) of one rank's queries and a {name} of other heads")
    if isinstance(mask, torch.Tensor):
        own = share.dim - 4 + mask.dim()
        theirs = call.share(mask)
        nothing = own < 0 or mask.shape[own] == 1 or own in call.alike(mask)
        if theirs != replace(share, dim=own) if theirs else not nothing:
            raise WrongError(f"it computes attention ({call.name}) with a mask {tuple(mask.shape)} of other heads")
    return share


def _convolution(call: Call) -> Share:
    tensor, share = _first(call)
    if tensor is not call.arguments["input"] or share.dim != 0:
        raise _over(call, tensor, share)
    return share


def _embedding(call: Call) -> Share:
    tensor, share = _first(call)
    if tensor is not call.arguments["indices"]:
        raise WrongError(f"it looks rows up in one rank's {share.what}")
    return share


def _at_places(call: Call) -> Share:
    """Gather and scatter: along a dim that is whole, at places of the same share."""
    tensors = [call.arguments[n] for n in ("self", "index", "src") if isinstance(call.arguments.get(n), torch.Tensor)]
    shares = {call.share(tensor) for tensor in tensors}
    (share,) = shares if len(shares) == 1 else (None,)
    if share is None or share.dim == call.arguments["dim"] % tensors[0].dim():
        tensor, share = next((t, s) for t in tensors if (s := call.share(t)))
        raise _over(call, tensor, share)
    return share


def _index(call: Call) -> Share:
    """Indexing with tensors, all of them in one place and before or after the share."""
    tensor, share = _first(call)
    indices = call.arguments["indices"]
    used = [dim for dim, index in enumerate(indices) if index is not None]
    wide = {dim: indices[dim].dim() if indices[dim].dtype != torch.bool else 0 for dim in used}
    if tensor is not call.arguments["self"] or share.dim in used or used != list(range(used[0], used[-1] + 1)):
        raise _over(call, tensor, share)
    if any(indices[dim].dtype == torch.bool for dim in used):
        raise _over(call, tensor, share)
    return replace(share, dim=share.dim + (max(wide.values()) - len(used) if used[0] < share.dim else 0))


def _index_select(call: Call) -> Share:
    tensor, share = _first(call)
    if tensor is not call.arguments["self"] or share.dim == call.arguments["dim"] % tensor.dim():
        raise _over(call, tensor, share)
    return share


def _reshape(call: Call) -> Share:
    """Follow the parts through the groups of dims that a reshape joins and splits."""
    tensor, share = _first(call)
    before, after = tuple(tensor.shape), tuple(call.outputs[0].shape)
    if call.arguments.get("dtype") is not None:
        if share.dim == len(before) - 1:
            raise _over(call, tensor, share)
        return share
    for old, new in _groups(before, after):
        if share.dim not in old:
            continue
        lead, tail = math.prod(before[old.start : share.dim]), math.prod(before[share.dim + 1 : old.stop])
        flat = [part * tail for part in share.parts] * lead
        repeats = share.dim + 1
        repeated = repeats in old and repeats in call.alike(tensor) and before[repeats] % share.copies == 0
        if repeated and _one_per_rank(share, tensor, call.ranks):  # each repeats its head for its own part of the rest
            share = replace(share, copies=1)
        for dim in new:
            outer, inner = math.prod(after[new.start : dim]), math.prod(after[dim + 1 : new.stop])
            once = flat[: len(flat) // outer] if outer and len(flat) % outer == 0 else []
            if once and once * outer == flat and _divide(tuple(once), inner * call.ranks // share.copies):
                return replace(share, dim=dim, parts=tuple(part // inner for part in once))
    raise WrongError(f"it computes {call.name} of one rank's {share.what}: no dim of {after} is its share of {before}")


def _one_per_rank(share: Share, tensor: torch.Tensor, ranks: int) -> bool:
    """Whether ranks share heads, in a dim of heads of which each rank has one."""
    return share.copies > 1 and tensor.shape[share.dim] * share.copies == ranks


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims with the same number of elements on both sides."""
    old = new = 0
    while old < len(before) or new < len(after):
        starts, sizes = (old, new), [1, 1]
        if old < len(before):
            sizes[0], old = before[old], old + 1
        if new < len(after):
            sizes[1], new = after[new], new + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1] and old < len(before):
                sizes[0], old = sizes[0] * before[old], old + 1
            elif new < len(after):
                sizes[1], new = sizes[1] * after[new], new + 1
            else:
                return
        yield range(starts[0], old), range(starts[1], new)


def _permute(call: Call) -> Share:
    tensor, share = _first(call)
    order = _normalized(call.arguments["dims"], tensor.dim())
    return replace(share, dim=order.index(share.dim))


def _transpose(call: Call) -> Share:
    tensor, share = _first(call)
    one, other = (_normalized(call.arguments.get(n, d), tensor.dim())[0] for n, d in (("dim0", 0), ("dim1", -1)))
    return replace(share, dim={one: other, other: one}.get(share.dim, share.dim))


def _unsqueeze(call: Call) -> Share:
    tensor, share = _first(call)
    dim = call.arguments["dim"] % (tensor.dim() + 1)
    return replace(share, dim=share.dim + (dim <= share.dim))


def _squeeze(call: Call) -> Share:
    tensor, share = _first(call)
    dims = _normalized(call.arguments.get("dim", range(tensor.dim())), tensor.dim())
    gone = [dim for dim in dims if tensor.shape[dim] == 1]
    if share.dim in gone:
        raise _apart(call, tensor, share)
    return replace(share, dim=share.dim - sum(dim < share.dim for dim in gone))


def _expand(call: Call) -> Share:
    tensor, share = _first(call)
    return replace(share, dim=share.dim + call.outputs[0].dim() - tensor.dim())


def _repeat(call: Call) -> Share:
    tensor, share = _first(call)
    repeats = call.arguments["repeats"]
    dim = share.dim + len(repeats) - tensor.dim()
    return replace(share, dim=dim, parts=share.parts * repeats[dim])


def _select(call: Call) -> Share:
    tensor, share = _first(call)
    dim = call.arguments.get("dim", 0) % tensor.dim()
    if dim == share.dim:
        raise _apart(call, tensor, share)
    return replace(share, dim=share.dim - (dim < share.dim))


def _unfold(call: Call) -> Share:
    tensor, share = _first(call)
    if call.arguments["dimension"] % tensor.dim() == share.dim:
        raise _apart(call, tensor, share)
    return share


def _slices(call: Call) -> list[Share | None]:
    """Slices and splits, which cut a share only between its parts."""
    tensor, share = _first(call)
    dim = call.arguments.get("dim", 0) % tensor.dim()
    if dim != share.dim:
        return [share for _ in call.outputs]
    sizes = [output.shape[dim] for output in call.outputs]
    if sizes == [tensor.shape[dim]]:
        return [share]
    step, start = call.arguments.get("step", 1), call.arguments.get("start") or 0
    every = step * call.ranks // share.copies
    if start in range(step) and sizes[0] * step == sum(share.parts) and _divide(share.parts, every):
        return [replace(share, parts=tuple(part // step for part in share.parts))]  # every second, third …
    if step != 1 or len(share.parts) == 1:
        raise _apart(call, tensor, share)
    edges = list(accumulate(sizes, initial=start % tensor.shape[dim]))
    bounds = list(accumulate(share.parts, initial=0))
    if not set(edges) <= set(bounds):
        raise WrongError(f"it takes {share.what} apart at {edges}")
    inside = [share.parts[bounds.index(begin) : bounds.index(end)] for begin, end in pairwise(edges)]
    return [replace(share, parts=parts) if parts else None for parts in inside]


def _divide(parts: tuple[int, ...], by: int) -> bool:
    return not any(part % by for part in parts)


def _apart(call: Call, tensor: torch.Tensor, share: Share) -> WrongError:
    return WrongError(f"it takes apart ({call.name}) {share.what} of which each rank has a share {tuple(tensor.shape)}")


def _cat(call: Call) -> Share:
    """Tensors of the same share side by side along another dim, or shares one after the other along theirs."""
    tensors = [tensor for tensor in call.arguments["tensors"] if tensor.dim() > 1 or tensor.numel()]
    rank = tensors[0].dim()
    dim = call.arguments.get("dim", 0) % rank
    shares = [call.share(tensor) for tensor in tensors]
    share = next(s for s in shares if s)
    if share.dim != dim:
        return _aligned(call, tensors, rank)
    alike = (dim, share.kind, share.copies)
    if any(s is None or (s.dim, s.kind, s.copies) != alike for s in shares) or share.kind == TOKENS:
        raise WrongError(f"it computes {call.name} of one rank's {share.what} and others along the same dim")
    return replace(share, parts=tuple(part for s in shares for part in s.parts))  # type: ignore[union-attr]


def _stack(call: Call) -> Share:
    tensors = call.arguments["tensors"]
    share = _aligned(call, tensors, tensors[0].dim())
    dim = call.arguments.get("dim", 0) % (tensors[0].dim() + 1)
    return replace(share, dim=share.dim + (dim <= share.dim))


def _like(call: Call) -> Share | None:
    return call.share(call.inputs[0])


def _fresh(call: Call) -> None:
    """A new constant of a size that is told in numbers."""


# Operators that make a constant: its values are the same along every dim.
CONSTANTS = frozenset(
    [
        "zeros",
        "ones",
        "full",
        "empty",
        "empty_strided",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_empty_strided",
        "scalar_tensor",
    ]
)
RANDOM = frozenset(
    [
        "native_dropout",
        "bernoulli",
        "bernoulli_",
        "rand_like",
        "randn_like",
        "uniform_",
        "normal_",
        "exponential_",
        "_fused_dropout",
    ]
)
# Views that only move values.
MOVES: dict[str, Rule] = {
    "view": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "select": _select,
    "unbind": _select,
    "slice": _slices,
    "split": _slices,
    "split_with_sizes": _slices,
    "chunk": _slices,
    "unsafe_split": _slices,
    "unsafe_split_with_sizes": _slices,
    "unsafe_chunk": _slices,
}
_ELEMENTWISE = (
    "where masked_fill _to_copy clone clamp fill zero hardswish _prelu_kernel log_sigmoid_forward complex polar real "
    "imag _conj conj_physical floor_divide native_dropout bernoulli uniform normal exponential "
    "rsub __iand __ior __ixor __and __or __xor"
)
_REDUCTIONS = (
    "sum mean var std prod amax amin max min any all argmax argmin logsumexp linalg_vector_norm norm var_mean "
    "std_mean nansum count_nonzero aminmax"
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention"
)
_ALONG = (
    "_softmax _safe_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort topk flip roll "
    "_fft_c2c _fft_r2c _fft_c2r"
)
RULES: dict[str, Rule] = {
    **MOVES,
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_ALONG.split(), _along("dim", "dims")),
    **dict.fromkeys(_ATTENTION.split(), _attention),
    **dict.fromkeys(_FACTORS, _product),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"), _like),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"), _fresh),
    **dict.fromkeys(("tril", "triu"), _last(2)),
    "view_as_real": _last(0),
    **dict.fromkeys(("gather", "scatter", "scatter_add"), _at_places),
    "view_as_complex": _last(1),
    "glu": _glu,
    "native_layer_norm": _norm,
    "_fused_rms_norm": _norm,
    "constant_pad_nd": _pad,
    "convolution": _convolution,
    "embedding": _embedding,
    "index": _index,
    "index_select": _index_select,
    "unfold": _unfold,
    "cat": _cat,
    "stack": _stack,
    "copy": _written,
}
