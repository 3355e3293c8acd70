"""The kernels that transformers has for experts compute the same on a rank's slice."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from am_moe import apply_ep
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import OLDEST, small

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def expert_gradients(model, implementation, share):
    model.set_experts_implementation(implementation)
    ids, labels = token_batch(4, 6)
    logits = model(input_ids=ids[share], use_cache=False).logits
    next_token_loss(logits, labels[share]).backward()
    return logits.detach(), {n: g.clone() for n, g in gradients(model).items()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.ranks(2)
def test_a_kernel_gives_what_the_loop_gives(implementation, dtype):
    model = tiny("qwen3_moe", layers=2, dtype=dtype)
    apply_ep(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("ep",)))
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    results = []
    for each in ("eager", implementation):
        model.zero_grad()
        results.append(expert_gradients(model, each, share))
    (loop, loop_gradients), (kernel, kernel_gradients) = results
    assert_same(kernel, loop, TOLERANCE[dtype], "logits")
    assert_same(kernel_gradients, loop_gradients, TOLERANCE[dtype], "gradients")


@pytest.mark.parametrize("model_type", ["gpt_oss", "aria_text", "nemotron_h", "mixtral"])
@pytest.mark.ranks(2)
def test_grouped_products_on_two_ranks_are_those_of_one_whatever_the_layout(model_type):
    if OLDEST and model_type == "aria_text":
        pytest.skip("its experts are not stacked in this transformers")
    model = small(model_type, dtype=torch.float32)
    one = copy.deepcopy(model)
    apply_ep(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("ep",)))
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    logits, mine = expert_gradients(model, "grouped_mm", share)
    expected, wanted = expert_gradients(one, "grouped_mm", slice(None))
    assert_same(logits, expected[share], 1e-5, "logits")
    experts = {name: gradient for name, gradient in mine.items() if isinstance(gradient, DTensor)}
    assert_same(experts, wanted, 1e-4, "expert gradients")
