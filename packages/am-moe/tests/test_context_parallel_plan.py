"""The plan of context parallelism and its kernels, without processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from am_moe.context_parallel import Block, Kind, Plan, Rule, head_tail, kernel
from am_moe.context_parallel.heads import repeated_for
from am_moe.context_parallel.kernel import Scores, block_backward, block_forward, merge
from am_moe.context_parallel.masks import describe
from am_moe.context_parallel.windows import Window, recognise
from am_testkit.device import device_type


@st.composite
def plans(draw):
    ranks = draw(st.integers(1, 5))
    seq_len = 2 * ranks * draw(st.integers(1, 6))
    before = draw(st.none() | st.integers(0, seq_len))
    after = draw(st.sampled_from([None, 0, before] if before is not None else [None, 0]))
    starts = None
    marked = draw(st.sampled_from(["nothing", "documents", "images"])) if after == 0 else "nothing"
    if marked != "nothing":
        cuts = [sorted(draw(st.sets(st.integers(1, seq_len - 1), max_size=3))) for _ in range(2)]
        cuts[1] = cuts[0] if draw(st.booleans()) else cuts[1]
        starts = torch.tensor([[max([c for c in row if c <= i], default=0) for i in range(seq_len)] for row in cuts])
    rule = Rule(before, after)
    if marked == "documents":
        rule = Rule(before, after, starts.amin(0).tolist(), starts.amax(0).tolist())
    if marked == "images":
        reach = reach_of(starts)
        rule = Rule(before, after, farthest=reach.amax(0).tolist(), nearest=reach.amin(0).tolist())
    return Plan(head_tail(seq_len, ranks), rule), starts


def reach_of(starts):
    """For each token the one after the last that it sees, where every other stretch between starts is an image."""
    at = torch.arange(starts.shape[1])
    reach = []
    for row in starts:
        kinds = (row.diff(prepend=row[:1]) != 0).cumsum(0)
        stop = torch.tensor([max(i for i in at.tolist() if kinds[i] == kind) + 1 for kind in kinds])
        reach.append(torch.where(kinds % 2 == 1, stop, at + 1))
    return torch.stack(reach)


def seen_by(plan, starts, row=0):
    """The mask as a matrix."""
    at = torch.arange(plan.seq_len)
    ahead = at[None] - at[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if plan.rule.farthest is not None:
        seen = at[None] < reach_of(starts)[row][:, None]
        starts = None
    elif plan.rule.after is not None:
        seen &= ahead <= plan.rule.after
    if plan.rule.before is not None:
        seen &= ahead >= -plan.rule.before
    return seen if starts is None else seen & (starts[row][:, None] == starts[row][None])


def check_parts(rule, block, mask):
    """The parts of a block let through together what the block does, each pair once."""
    together = torch.zeros_like(mask, dtype=torch.int64)
    parts = rule.parts(block)
    for part in parts:
        rows, columns = slice(*part.queries), slice(*part.keys)
        seen = torch.ones_like(mask[rows, columns])
        assert seen.numel()
        if part.kind is Kind.CAUSAL:
            seen = seen.tril()
        if part.kind is Kind.REVERSED:
            seen = seen.triu()
        if part.kind is Kind.PARTIAL:
            seen = mask[rows, columns]
        together[rows, columns] += seen
    within = torch.zeros_like(mask)
    within[slice(*block.queries), slice(*block.keys)] = True
    assert together.equal((mask & within).long())
    if rule.after == 0 and rule.earliest == rule.latest and rule.farthest == rule.nearest:
        assert all(part.kind is not Kind.PARTIAL for part in parts)


@given(plans())
@settings(max_examples=150, deadline=None)
def test_blocks_cover_what_the_mask_lets_through_once_and_claim_no_more(case):
    plan, starts = case
    ranks = range(len(plan.layout))
    covered = torch.zeros(plan.seq_len, plan.seq_len, dtype=torch.int64)
    masks = [seen_by(plan, starts, row) for row in range(2)]
    for rank in ranks:
        for source in ranks:
            wanted = plan.wanted(rank, source)
            for block in plan.blocks(rank, source):
                rows, columns = slice(*block.queries), slice(*block.keys)
                covered[rows, columns] += 1
                assert any(a <= block.keys[0] and block.keys[1] <= b for a, b in wanted)
                for mask in masks:
                    part = mask[rows, columns]
                    if block.kind is Kind.FULL:
                        assert part.all()
                    if block.kind is Kind.CAUSAL:
                        assert part.equal(torch.ones_like(part).tril())
                    check_parts(plan.rule, block, mask)
    assert covered.max() <= 1
    for mask in masks:
        assert covered[mask].all()


@given(plans())
@settings(max_examples=100, deadline=None)
def test_every_token_is_held_once_and_found_where_it_lies(case):
    plan, _ = case
    held = []
    for rank, intervals in enumerate(plan.layout):
        mine = [token for start, stop in intervals for token in range(start, stop)]
        assert [plan.offset(rank, token) for token in mine] == list(range(len(mine)))
        held += mine
    assert sorted(held) == list(range(plan.seq_len))


def test_work_is_even_under_a_causal_mask_and_no_message_carries_hidden_keys():
    plan = Plan(head_tail(64, 4), Rule())
    work = []
    for rank in range(4):
        pairs = 0
        for source in range(4):
            for block in plan.blocks(rank, source):
                rows, columns = (stop - start for start, stop in (block.queries, block.keys))
                pairs += rows * (rows + 1) // 2 if block.kind is Kind.CAUSAL else rows * columns
        work.append(pairs)
    assert len(set(work)) == 1
    # Half of a rank's tokens, its head, go to all three others; its tail goes to the ranks before it.
    assert [plan.tokens_sent(rank) for rank in range(4)] == [24, 32, 40, 48]


def test_a_window_sends_what_it_reaches():
    plan = Plan(head_tail(8192, 4), Rule(before=127))
    assert [plan.tokens_sent(rank) for rank in range(4)] == [127 * n for n in (1, 2, 2, 1)]


def test_a_plan_prints_its_steps():
    text = str(Plan(head_tail(16, 2), Rule(before=2)))
    assert "rank 0 holds 0-3, 12-15" in text
    assert "step 1, from rank 0: 4-5 x 2-3 partial" in text


@pytest.mark.parametrize(
    ("length", "fix"), [(30, "cut it to 24 or pad it to 32"), (3, "pad it to 8"), (0, "pad it to 8")]
)
def test_a_length_that_does_not_divide_is_refused_with_the_nearest(length, fix):
    with pytest.raises(ValueError, match=f"{length} tokens does not divide into 2 x 4 chunks.*{fix}"):
        head_tail(length, 4)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 8))
def test_repeated_key_value_heads_divide_and_keep_their_queries(kv_heads, group, ranks):
    heads = kv_heads * group
    if heads % ranks:
        return
    times = repeated_for(kv_heads, ranks)
    assert kv_heads * times % ranks == 0
    assert heads % (kv_heads * times) == 0
    repeated = [head // times for head in range(kv_heads * times)]
    for head in range(heads):
        assert repeated[head // (heads // len(repeated))] == head // group


def dense(q, k, v, mask, scale, softcap):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if softcap:
        s = (s / softcap).tanh() * softcap
    return s.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("value_width", [10, 6])
@pytest.mark.parametrize("before", [None, 299])
@pytest.mark.parametrize("starts", [None, [0, 500, 800]])
def test_blocks_larger_than_a_tile_join_to_dense_attention(softcap, value_width, before, starts, monkeypatch):
    monkeypatch.setattr(kernel, "_SCORES", 2**18)
    torch.manual_seed(0)
    seq_len = 1100
    groups = None
    if starts is not None:
        groups = torch.tensor([[max(s for s in starts if s <= i) for i in range(seq_len)]])
    first = None if groups is None else groups[0].tolist()
    plan = Plan(head_tail(seq_len, 1), Rule(before, 0, first, first))
    scores = Scores(plan.rule, 0.3, softcap, groups, groups)
    q = torch.randn(1, 2, seq_len, 10, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, seq_len, 10, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 1, seq_len, value_width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 2, seq_len, value_width, dtype=torch.float64)
    expected = dense(q, k, v, seen_by(plan, groups), 0.3, softcap)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    (block,) = plan.blocks(0, 0)
    with torch.no_grad():
        out, lse = block_forward(q, k, v, block, scores)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for actual, target in zip(block_backward(grad, q, k, v, out, lse, block, scores), wanted, strict=True):
            torch.testing.assert_close(actual, target, rtol=1e-11, atol=1e-11)


class Launches(TorchDispatchMode):
    """Counts operators that compute, and those of them that are the fused kernel."""

    def __init__(self):
        super().__init__()
        self.fused = self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "flash_attention" in func.name()
        self.all += not func.is_view
        return func(*args, **(kwargs or {}))


LONG = 2048
PADDING = torch.ones(2, LONG, dtype=torch.bool)
PADDING[0, :350] = PADDING[1, 1500:] = False
POSITIONS = torch.arange(LONG)[None].repeat(2, 1)
POSITIONS[0, 750:] -= 750
POSITIONS[1, 1450:] -= 1450
POSITIONS[1, 350:1450] -= 350
# What a layer's attention is; how many launches of the fused kernel, and of anything, its block of a rank may take.
CASES = {
    "values of another width": ({"widths": (24, 16)}, 1, 8),
    "padding, on other sides of the rows": ({"valid": PADDING}, 3, 60),
    "padding, a window": ({"valid": PADDING, "before": 1023}, 8, 170),
    "documents, other ones in each row": ({"positions": POSITIONS}, 5, 100),
    "a soft-cap": ({"softcap": 2.0}, 0, 50),
    "a soft-cap and padding": ({"softcap": 2.0, "valid": PADDING}, 0, 50),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_launches_few_kernels_however_long_it_is(case):
    settings, fused, most = CASES[case]
    torch.manual_seed(0)
    width, value_width = settings.get("widths", (16, 16))
    q, k = (torch.randn(2, 1, LONG, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 1, LONG, value_width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 1, LONG, value_width, dtype=torch.float64)
    positions = settings.get("positions", torch.arange(LONG)[None].expand(2, -1))
    mask = describe(positions, settings.get("valid"), 1).mask(Window(settings.get("before"), 0))
    softcap = settings.get("softcap")
    scores = Scores(mask.plan.rule, 0.3, softcap, mask.query_groups_BN, mask.key_groups_BN, mask.reach_BN, mask.rows)
    (block,) = mask.plan.blocks(0, 0)
    with torch.no_grad(), Launches() as forward:
        out, lse = block_forward(q, k, v, block, scores)
    with torch.no_grad(), Launches() as backward:
        gradients = block_backward(grad, q, k, v, out, lse, block, scores)
    assert (forward.fused, backward.fused) == (fused, fused)
    assert max(forward.all, backward.all) <= most
    seen = seen_by(mask.plan, None)[None, None]
    if mask.key_groups_BN is not None:
        seen = seen & (mask.query_groups_BN[:, None, :, None] == mask.key_groups_BN[:, None, None, :])
    some = seen.any(-1, keepdim=True)  # a query that sees no key returns zeros
    expected = dense(q, k, v, seen | ~some, 0.3, softcap).where(some, 0.0)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    for actual, target in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, target, rtol=1e-9, atol=1e-9)


def test_blocks_are_planned_once_for_all_layers():
    mask = describe(POSITIONS, None, 2).mask(Window(None, 0))
    assert mask.plan.blocks(0, 1) is mask.plan.blocks(0, 1)
    block = Block((0, LONG), (0, LONG), Kind.PARTIAL)
    assert mask.rows[0].parts(block) is mask.rows[0].parts(block)


def test_joining_with_nothing_changes_nothing():
    out, lse = torch.randn(2, 3, 4), torch.randn(2, 3)
    before = out.clone(), lse.clone()
    merge(out, lse, torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    torch.testing.assert_close((out, lse), before)
    empty = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    merge(*empty, torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    assert not empty[0].any()
    assert (empty[1] == -torch.inf).all()


@pytest.mark.parametrize("tokens", [40, 2000])  # all answers of the function compared, and some
def test_masks_of_transformers_are_recognised_and_others_refused(tokens):
    from transformers import masking_utils as hf

    def found(function):
        window = recognise(function, 2, tokens, torch.device(device_type()))
        reach = window.reach_BN
        return window.before, window.after, None if reach is None else (reach - torch.arange(tokens) - 1).tolist()

    none = torch.full((2, tokens), -1, device=device_type())
    images = none.clone()
    images[0, 20:23] = 0
    images[1, tokens - 3 :] = images[1, 30:32] = 1
    reach = [[0] * tokens, [0] * tokens]
    reach[0][20:22] = reach[1][-3:-1] = [2, 1]
    reach[1][30] = 1
    windowed = hf.sliding_window_overlay(25)
    causal, blocks = hf.causal_mask_function, hf.blockwise_overlay(images)
    for function, window in (
        (causal, (None, 0, None)),
        (hf.bidirectional_mask_function, (None, None, None)),
        (hf.sliding_window_causal_mask_function(7), (6, 0, None)),
        (hf.sliding_window_bidirectional_mask_function(7), (7, 7, None)),
        (hf.or_masks(causal, hf.blockwise_overlay(none)), (None, 0, None)),
        (hf.and_masks(hf.or_masks(causal, hf.blockwise_overlay(none)), windowed), (24, 0, None)),
    ):
        assert found(function) == window
    apart = images.clone()
    apart[1, 30:32] = 0
    for function, before in (
        (hf.or_masks(causal, hf.blockwise_overlay(apart)), None),
        (hf.and_masks(hf.or_masks(causal, hf.blockwise_overlay(apart)), windowed), 24),
    ):
        assert found(function) == (before, 0, reach)
    documents = (torch.arange(tokens, device=device_type()) >= 30).expand(2, -1)
    for other in (
        hf.chunked_causal_mask_function(25, torch.zeros(2, dtype=torch.int64, device=device_type())),
        hf.or_masks(causal, lambda b, h, q, k: k == 25),
        hf.or_masks(causal, blocks),  # an image in two places
        hf.or_masks(hf.sliding_window_causal_mask_function(2), hf.blockwise_overlay(apart)),  # shorter than an image
        hf.and_masks(causal, hf.packed_sequence_mask_function(documents)),
        hf.and_masks(causal, hf.packed_sequence_mask_function(documents[:, :9])),
    ):
        with pytest.raises(ValueError, match="attention mask"):
            found(other)


def test_documents_are_found_where_positions_start_anew():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [5, 6, 7, 8, 9, 10, 0, 1]])
    sequence = describe(positions, None, 2)
    assert sequence.starts_BN.tolist() == [[0, 0, 0, 3, 3, 5, 5, 5], [0, 0, 0, 0, 0, 0, 6, 6]]
    assert describe(positions[1:, :6], None, 1).starts_BN is None
    rule = sequence.mask(Window(None, 0)).plan.rule
    assert rule.earliest == [0, 0, 0, 0, 0, 0, 5, 5]
    assert rule.latest == [0, 0, 0, 3, 3, 5, 6, 6]
