"""Models with 4-bit linears: experts over ranks train beside them, layouts that would have to read them refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import am_moe
import am_pipeline
import am_tp_plans
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

bnb = pytest.importorskip("bitsandbytes")


def packed(family, storage=torch.uint8):
    """The attention's linears in 4 bits and frozen, the rest trained."""
    model = tiny(family, layers=2, dtype=torch.float32)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "self_attn" in n]:
        settings = {"bias": False, "compute_dtype": torch.float32, "quant_storage": storage}
        new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **settings)
        new.load_state_dict(linear.state_dict())
        model.set_submodule(name, new.to("cpu"))
    return model


@pytest.mark.ranks(2)
def test_experts_over_ranks_train_beside_packed_attention():
    one = packed("qwen3_moe")
    model = copy.deepcopy(one)
    meshes = am_moe.build_meshes("cpu", dp_shard=2, ep=2)
    axes = {"dp_axis_names": ("dp_shard",), "ep_axis_name": "ep", "ep_shard_axis_names": ("ep_shard",)}
    with pytest.raises(ValueError, match=r"mixed precision would cast to torch.bfloat16"):
        am_moe.parallelize_model(
            packed("qwen3_moe", torch.float32),
            *meshes,
            **axes,
            mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        )
    am_moe.parallelize_model(model, *meshes, **axes)
    ids, labels = token_batch(4, 8)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    next_token_loss(one(ids, use_cache=False).logits, labels).backward()
    next_token_loss(model(ids[mine], use_cache=False).logits, labels[mine]).backward()
    assert_same(gradients(model), gradients(one), 1e-5, "gradients")


@pytest.mark.ranks(1)
def test_tensor_and_context_parallelism_say_that_weights_are_packed_and_a_pipeline_is_cut_between_them():
    model = packed("llama")
    plan = am_tp_plans.resolve_plan(tiny("llama", layers=2))
    with pytest.raises(ValueError, match=r"q_proj.weight is packed \(quantised\) into shape .*FSDP2 can"):
        am_tp_plans.fit_plan(model, plan, 2)
    ids, _ = token_batch(2, 8)
    expected = model(ids, use_cache=False).logits
    cut, sent = am_pipeline.plan_cut(model, 2), ids
    for stage in range(2):
        sent = am_pipeline.build_part(model, cut, stage)[0](sent)
    assert_same(getattr(sent, "logits", sent), expected, 1e-10)
    with pytest.raises(ValueError, match=r"it holds packed \(quantised\) weights such as .*q_proj.weight"):
        am_moe.apply_cp(model, init_device_mesh("cpu", (1,), mesh_dim_names=("cp",)))
