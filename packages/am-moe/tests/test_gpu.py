"""Experts on a GPU: the same numbers, and how fast next to transformers' own and to one dense product.

`pytest -s` prints the table. The single-process group has one rank, so nothing travels; what is measured is what the
way through dispatch, slices and sums costs around the same kernel.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe import apply_ac, apply_ep, apply_fsdp
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS, HIDDEN, INNER, EXPERTS, CHOICES = 16384, 2048, 768, 128, 8


@pytest.fixture
def mesh():
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cuda", (1,), mesh_dim_names=("ep",))
    dist.destroy_process_group()


def experts(implementation):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS)
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config).to("cuda", torch.bfloat16)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return nn.ModuleDict({"experts": module})


def routed(tokens):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, device="cuda", generator=generator).topk(CHOICES)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
    return hidden.requires_grad_(), ids, weights.requires_grad_()


def seconds(run, rounds=10):
    """Of one forward and backward, the median."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return sorted(times)[rounds // 2]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_of_one_rank_give_what_the_module_gives(mesh, implementation):
    one = experts(implementation)
    model = apply_ep(copy.deepcopy(one), mesh)
    inputs = routed(512)
    out, expected = model["experts"](*inputs), one["experts"](*inputs)
    out.square().sum().backward()
    mine = {name: p.grad.to_local() for name, p in model.named_parameters()}
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    for name, parameter in one.named_parameters():
        error = (mine[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 2e-2, name


def test_the_way_through_dispatch_costs_little_beside_the_products(mesh):
    flops = 3 * 2 * TOKENS * CHOICES * HIDDEN * INNER * 3
    inputs = routed(TOKENS)
    one = experts("grouped_mm")
    model = apply_ep(copy.deepcopy(one), mesh)
    left = torch.randn(TOKENS * CHOICES, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dense = nn.Linear(HIDDEN, 3 * INNER, bias=False, device="cuda", dtype=torch.bfloat16)
    runs = {
        "one dense product of as many": lambda: dense(left).sum().backward(),
        "transformers, grouped_mm": lambda: one["experts"](*inputs).sum().backward(),
        "am-moe on one rank": lambda: model["experts"](*inputs).sum().backward(),
    }
    speed = {name: flops / seconds(run) / 1e12 for name, run in runs.items()}
    print("\n| forward and backward of a layer | TFLOP/s |\n|---|---|")
    for name, each in speed.items():
        print(f"| {name} | {each:.0f} |")
    assert speed["am-moe on one rank"] > 0.5 * speed["transformers, grouped_mm"]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_a_model_trains_through_dispatch_recomputation_and_fsdp(mesh, dispatcher, family):
    one = tiny(family, layers=2, attention="sdpa").cuda()
    model = apply_ac(apply_ep(copy.deepcopy(one), mesh, dispatcher=dispatcher), ignore_router=True)
    apply_fsdp(model, mesh, ep_enabled=True, ep_shard_enabled=False)
    steps = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, one)]
    ids, labels = (t.cuda() for t in token_batch(4, 16))
    for _ in range(3):
        results = [m(ids, use_cache=False).logits for m in (model, one)]
        assert_same(*results, 1e-5, "logits")  # routers compute in float32
        for logits, step in zip(results, steps, strict=True):
            step.zero_grad()
            next_token_loss(logits, labels).backward()
        assert_same(gradients(model), gradients(one), 1e-5, "gradients")
        for step in steps:
            step.step()
