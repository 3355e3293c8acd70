"""Context-parallel attention with the GPU's kernels, block by block as the ranks of an axis compute it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_moe.context_parallel import Plan, Rule, apply_cp, head_tail, shard_batch, shard_loss
from am_moe.context_parallel.fused import has_fused
from am_moe.context_parallel.kernel import Scores, block_backward, block_forward, merge
from am_testkit.exact import gradients
from am_testkit.models import next_token_loss, tiny, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE, SEQ_LEN, RANKS = "cuda", 1024, 4
STARTS = [0, 100, 612]


def seen_by(rule):
    at = torch.arange(SEQ_LEN, device=DEVICE)
    ahead = at[None] - at[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if rule.after is not None:
        seen &= ahead <= rule.after
    if rule.before is not None:
        seen &= ahead >= -rule.before
    if rule.earliest is not None:
        first = torch.tensor(rule.earliest, device=DEVICE)
        seen &= first[:, None] == first[None]
    return seen


def dense(q, k, v, scores, seen):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scores.scale
    if scores.softcap:
        s = (s / scores.softcap).tanh() * scores.softcap
    return s.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def over_ranks(q, k, v, grad, plan, scores):
    """Output and gradients, each rank's queries against the blocks of keys of every rank."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float32, device=DEVICE)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=DEVICE)
    blocks = [b for rank in range(RANKS) for source in range(RANKS) for b in plan.blocks(rank, source)]
    for block in blocks:
        rows, columns = slice(*block.queries), slice(*block.keys)
        more = block_forward(q[:, :, rows], k[:, :, columns], v[:, :, columns], block, scores)
        merge(out[:, :, rows], lse[:, :, rows], *more)
    out = out.to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for block in blocks:
        rows, columns = slice(*block.queries), slice(*block.keys)
        of_queries = (x[:, :, rows] for x in (grad, q))
        of_keys = (x[:, :, columns] for x in (k, v))
        whole = (x[:, :, rows] for x in (out, lse))
        more = block_backward(*of_queries, *of_keys, *whole, block, scores)
        for total, at, one in zip((dq, dk, dv), (rows, columns, columns), more, strict=True):
            total[:, :, at] += one
    return out, dq, dk, dv


RULES = {
    "causal": Rule(),
    "bidirectional": Rule(after=None),
    "window": Rule(before=199),
    "documents": Rule(None, 0, *2 * [[max(s for s in STARTS if s <= i) for i in range(SEQ_LEN)]]),
}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_four_ranks_join_to_attention_of_the_whole_sequence(rule, dtype, width, kv_heads):
    torch.manual_seed(0)
    plan = Plan(head_tail(SEQ_LEN, RANKS), RULES[rule])
    first = plan.rule.earliest
    groups = None if first is None else torch.tensor([first, first], device=DEVICE)
    scores = Scores(plan.rule, width**-0.5, None, groups, groups)
    q = torch.randn(2, 8, SEQ_LEN, width, device=DEVICE).to(dtype)
    k, v = (torch.randn(2, kv_heads, SEQ_LEN, width, device=DEVICE).to(dtype) for _ in range(2))
    grad = torch.randn(2, 8, SEQ_LEN, width, device=DEVICE).to(dtype)
    assert has_fused(q, v) == (dtype is not torch.float32)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = dense(*exact, scores, seen_by(plan.rule))
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}[dtype]
    with torch.no_grad():
        for actual, target in zip(over_ranks(q, k, v, grad, plan, scores), wanted, strict=True):
            error = (actual.double() - target).norm() / target.norm()
            assert error < tolerance, f"{error:.1e}"


@pytest.fixture
def mesh():
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh(DEVICE, (1,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
@pytest.mark.parametrize("window", [None, 100])
def test_a_model_in_bfloat16_is_as_near_to_exact_as_without_a_context_axis(mesh, window, kind):
    family, settings = ("mistral", {"sliding_window": window}) if window else ("llama", {})
    exact = tiny(family, layers=2, attention="sdpa", max_position_embeddings=512, **settings).to(DEVICE)
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    model = apply_cp(copy.deepcopy(plain), mesh, kind)
    ids = token_batch(2, 512)[0].to(DEVICE)
    losses = [next_token_loss(m(ids, use_cache=False).logits[:, :-1], ids[:, 1:]) for m in (exact, plain)]
    shard = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    shard_loss(model(input_ids=shard["input_ids"], position_ids=shard["position_ids"]).logits, shard).backward()
    for loss in losses:
        loss.backward()
    wanted, usual, mine = (gradients(m) for m in (exact, plain, model))
    for name, target in wanted.items():
        errors = [((g[name].double() - target).norm() / target.norm()).item() for g in (usual, mine)]
        assert errors[1] < 2 * errors[0] + 1e-2, f"{name}: {errors}"
