"""Spread experts train like one process, under a real process group."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_moe import apply_ep, apply_fsdp, find_experts
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch

FAMILIES = ["qwen3_moe", "mixtral"]


def experts_mesh(size=None):
    return init_device_mesh(device_type(), (size or dist.get_world_size(),), mesh_dim_names=("ep",))


def train_both(model, one, *, steps=2):
    """Each rank trains on its share of the batch, the whole model on all of it; everything must agree."""
    size, rank = dist.get_world_size(), dist.get_rank()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, one)]
    for step in range(steps):
        ids, labels = token_batch(8, 6, seed=step)
        share = slice(rank * 8 // size, (rank + 1) * 8 // size)
        logits = model(ids[share], use_cache=False).logits
        next_token_loss(logits, labels[share]).backward()
        expected = one(ids, use_cache=False).logits
        next_token_loss(expected, labels).backward()
        assert_same(logits, expected[share], 1e-12, f"logits of step {step}")
        assert_same(gradients(model), gradients(one), 1e-10, f"gradients of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(model.named_parameters()), dict(one.named_parameters()), 1e-9, "weights")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.ranks(2)
def test_expert_gradients_are_averages_over_the_axis_when_backward_returns(family):
    model = tiny(family)
    one, names = copy.deepcopy(model), set(model.state_dict())
    apply_ep(model, experts_mesh())
    assert set(model.state_dict()) == names
    ids, labels = token_batch(4, 6)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    next_token_loss(model(ids[share], use_cache=False).logits, labels[share]).backward()
    next_token_loss(one(ids, use_cache=False).logits, labels).backward()
    expected = gradients(one)
    for name, gradient in gradients(model).items():
        if not isinstance(gradient, DTensor):  # nobody averages the dense gradients here, so do it by hand
            dist.all_reduce(gradient)
            gradient /= 2
        assert_same(gradient, expected[name], 1e-10, name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.ranks(2)
def test_experts_over_the_data_ranks_and_fsdp_train_like_one_process(family):
    model = tiny(family)
    one = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",))
    apply_ep(model, experts_mesh())
    apply_fsdp(model, mesh, ep_enabled=True, ep_shard_enabled=False)
    train_both(model, one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.ranks(4)
def test_experts_with_replicas_are_sharded_over_those_and_train_like_one_process(family, reshard):
    model = tiny(family)
    one = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (4,), mesh_dim_names=("dp",))
    moe_mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("ep_shard", "ep"))
    apply_ep(model, moe_mesh["ep"], moe_mesh)
    apply_fsdp(model, mesh, True, True, moe_mesh["ep_shard"], reshard_after_forward=reshard)
    experts = find_experts(model)[0][1]
    assert isinstance(experts, FSDPModule)
    assert experts.gate_up_proj.to_local().numel() == experts.gate_up_proj.numel() / 4
    train_both(model, one)


@pytest.mark.ranks(2)
def test_experts_on_meta_become_slices_on_meta():
    with torch.device("meta"):
        model = tiny("qwen3_moe")
    apply_ep(model, experts_mesh())
    experts = find_experts(model)[0][1]
    assert experts.gate_up_proj.is_meta
    assert experts.gate_up_proj.to_local().shape[0] == 4


@pytest.mark.ranks(3)
def test_experts_that_do_not_divide_are_refused_with_the_divisors():
    with pytest.raises(ValueError, match=r"8 experts of model\.layers\.0\.mlp\.experts .* 3 ranks; .* \[1, 2, 4, 8\]"):
        apply_ep(tiny("qwen3_moe"), experts_mesh())


@pytest.mark.ranks(2)
def test_experts_that_are_separate_modules_are_refused_by_name():
    model = nn.ModuleDict({"experts": nn.ModuleDict({f"expert_{i}": nn.Linear(2, 2) for i in range(4)})})
    with pytest.raises(ValueError, match="experts holds 4 separate modules; stack their parameters"):
        apply_ep(model, experts_mesh())


@pytest.mark.ranks(2)
def test_wrong_requests_are_refused_on_every_rank():
    with pytest.raises(ValueError, match="Linear has no experts to spread"):
        apply_ep(nn.Linear(2, 2), experts_mesh())
    with pytest.raises(ValueError, match="must have one axis"):
        apply_ep(tiny("qwen3_moe"), init_device_mesh(device_type(), (1, 2), mesh_dim_names=("a", "b")))
    model = apply_ep(tiny("qwen3_moe"), experts_mesh())
    with pytest.raises(ValueError, match="distributed already"):
        apply_ep(model, experts_mesh())
    with pytest.raises(ValueError, match="needs ep_shard_mesh"):
        apply_fsdp(model, experts_mesh(), True, True)
    with pytest.raises(ValueError, match="'half precision' is not a torch dtype"):
        apply_fsdp(model, experts_mesh(), True, False, lm_head_precision="half precision")
    tied = tiny("qwen3_moe", tied=True)
    with pytest.raises(ValueError, match="tied to the embedding"):
        apply_fsdp(tied, experts_mesh(), False, False, lm_head_precision="float32")


@pytest.mark.ranks(2)
def test_a_head_can_compute_in_float32_in_a_bfloat16_model():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = tiny("qwen3_moe", dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",))
    apply_ep(model, experts_mesh())
    apply_fsdp(model, mesh, True, False, mp_policy=policy, lm_head_precision="float32")
    ids, labels = token_batch(2, 6)
    logits = model(ids, use_cache=False).logits
    assert logits.dtype is torch.float32
    next_token_loss(logits, labels).backward()
    assert all(torch.isfinite(whole(g)).all() for g in gradients(model).values())
