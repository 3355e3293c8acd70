"""The rules say of every rank's share what the operator really does to it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from am_tp_plans.proof.shares import FEATURES, RULES, Call, Share, WrongError, shares_after

RANKS = 2


def part(whole, share, rank):
    """What a rank holds of a tensor."""
    pieces = []
    for begin, end in pairwise(accumulate(share.parts, initial=0)):
        width = (end - begin) // RANKS
        pieces.append(whole.narrow(share.dim, begin + rank * width, width))
    return torch.cat(pieces, share.dim)


def call_of(name, tensor, share, outputs, **arguments):
    return Call(
        name,
        {"self": tensor, **arguments},
        [tensor],
        list(outputs),
        RANKS,
        lambda t: share if t is tensor else None,
        lambda t: frozenset(),
    )


def arranged(sizes, parts, dim):
    """A tensor whose dim is made of parts, every value another one."""
    shape = [*sizes[:dim], sum(parts), *sizes[dim:]]
    return torch.arange(torch.Size(shape).numel()).view(shape)


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3),
    parts=st.lists(st.sampled_from([2, 4, 8, 12]), min_size=1, max_size=3),
    data=st.data(),
)
def test_a_reshape_moves_a_share_where_the_rule_says_or_is_refused(sizes, parts, data):
    dim = data.draw(st.integers(0, len(sizes)))
    whole = arranged(sizes, parts, dim)
    share = Share(dim, FEATURES, tuple(parts))
    left, after = whole.numel(), []
    for _ in range(data.draw(st.integers(0, 3))):
        after.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= after[-1]
    after.append(left)
    reshaped = whole.reshape(after)
    try:
        (found,) = shares_after(call_of("view", whole, share, [reshaped], size=after), pointwise=False)
    except WrongError:
        return
    shape = [size // RANKS if d == found.dim else size for d, size in enumerate(after)]
    for rank in range(RANKS):
        assert torch.equal(part(whole, share, rank).reshape(shape), part(reshaped, found, rank))


@given(
    name=st.sampled_from(["permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "select", "flip", "glu"]),
    sizes=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    parts=st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2),
    data=st.data(),
)
def test_what_moves_values_moves_a_share_where_the_rule_says_or_is_refused(name, sizes, parts, data):
    dim = data.draw(st.integers(0, len(sizes)))
    whole, share = arranged(sizes, parts, dim), Share(dim, FEATURES, tuple(parts))
    rank = whole.dim()
    any_dim = st.integers(-rank, rank - 1)
    arguments = {
        "permute": lambda: {"dims": data.draw(st.permutations(range(rank)))},
        "transpose": lambda: {"dim0": data.draw(any_dim), "dim1": data.draw(any_dim)},
        "unsqueeze": lambda: {"dim": data.draw(st.integers(-rank - 1, rank))},
        "squeeze": lambda: {"dim": data.draw(any_dim)},
        "expand": lambda: {"size": [data.draw(st.integers(1, 3)), *[-1] * rank]},
        "repeat": lambda: {"repeats": data.draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank + 1))},
        "select": lambda: {"dim": data.draw(any_dim), "index": 0},
        "flip": lambda: {"dims": [data.draw(any_dim)]},
        "glu": lambda: {"dim": data.draw(any_dim)},
    }[name]()

    def run(tensor):
        values = list(arguments.values())
        return torch.nn.functional.glu(tensor.double(), *values) if name == "glu" else getattr(tensor, name)(*values)

    try:
        output = run(whole)
        (found,) = shares_after(call_of(name, whole, share, [output], **arguments), pointwise=False)
    except (WrongError, RuntimeError):
        return
    for r in range(RANKS):
        mine, wanted = run(part(whole, share, r)), part(output, found, r)
        # a squeezed share of one column is seen by its shape, which is compared as well
        assert (
            mine.shape != wanted.shape if name == "squeeze" and mine.dim() < wanted.dim() else torch.equal(mine, wanted)
        )


@given(parts=st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=3), data=st.data())
def test_a_slice_takes_whole_parts_or_every_second_or_is_refused(parts, data):
    whole, share = arranged([3], parts, 1), Share(1, FEATURES, tuple(parts))
    start, end = data.draw(st.integers(0, sum(parts) - 1)), data.draw(st.integers(1, sum(parts)))
    step = data.draw(st.integers(1, 2))
    output = whole[:, start:end:step]
    call = call_of("slice", whole, share, [output], dim=1, start=start, end=end, step=step)
    try:
        (found,) = shares_after(call, pointwise=False)
    except WrongError:
        return
    if found is None:
        assert output.numel() == 0
        return
    for rank in range(RANKS):
        mine = part(whole, share, rank)
        first = start if step > 1 or start == 0 else start // RANKS
        taken = mine[:, first::step][:, : output.shape[1] // RANKS]
        assert torch.equal(taken, part(output, found, rank))


@given(
    heads=st.sampled_from([1, 2, 3]),
    copies=st.sampled_from([2, 3]),
    queries=st.sampled_from([1, 2]),
    tail=st.sampled_from([(), (3,), (2, 3)]),
    data=st.data(),
)
def test_a_head_that_ranks_share_becomes_their_own_where_each_repeats_it_for_itself(heads, copies, queries, tail, data):
    ranks, times = heads * copies, copies * queries
    whole = torch.arange(math.prod((2, heads, *tail))).view(2, heads, *tail)
    expanded = whole.unsqueeze(2).expand(2, heads, times, *tail)
    # heads and their repetitions together, alone or with some of what follows
    joined = data.draw(st.integers(0, len(tail)))
    shape = (2, heads * times * math.prod(tail[:joined]), *tail[joined:])
    share = Share(1, FEATURES, (heads,), copies)
    call = replace(call_of("view", expanded, share, [expanded.reshape(shape)]), ranks=ranks, alike=lambda t: {2})
    (found,) = shares_after(call, pointwise=False)
    assert (found.dim, found.copies) == (1, 1)
    for rank in range(ranks):
        mine = whole[:, rank // copies].view(2, 1, 1, *tail).expand(2, 1, queries, *tail)
        width = shape[1] // ranks
        wanted = expanded.reshape(shape).narrow(1, rank * width, width)
        assert torch.equal(mine.reshape(2, width, *tail[joined:]), wanted)
    with contextlib.suppress(WrongError):  # of what is not alike along the repetitions
        (found,) = shares_after(replace(call, alike=lambda t: frozenset()), pointwise=False)
        assert found.copies == copies


@pytest.mark.parametrize("name", ["mish_of_tomorrow", "histc", "cdist", "_local_scalar_dense"])
def test_an_operator_without_a_rule_is_refused_by_name(name):
    assert name not in RULES
    tensor = torch.zeros(2, 4)
    with pytest.raises(WrongError, match=f"it computes {name} of one rank's features .* which has no rule"):
        shares_after(call_of(name, tensor, Share(1, FEATURES, (4,)), [tensor]), pointwise=False)
