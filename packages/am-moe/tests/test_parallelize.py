"""All parallelisms at once train like one process."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard

from am_moe import build_meshes, find_experts, parallelize_model
from am_moe.context_parallel import shard_batch
from am_moe.meshes import check_degrees
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small

AXES = {
    "dp_axis_names": ("dp_shard",),
    "tp_axis_name": "tp",
    "ep_axis_name": "ep",
    "ep_shard_axis_names": ("ep_shard",),
}


def step_both(model, one, data, tolerance=1e-10, seed=0):
    ids, labels = token_batch(8, 6, seed=seed)
    each = 8 // data.size()
    share = slice(data.get_local_rank() * each, (data.get_local_rank() + 1) * each)
    logits = model(ids[share], use_cache=False).logits
    expected = one(ids, use_cache=False).logits
    next_token_loss(whole(logits), labels[share]).backward()
    next_token_loss(expected, labels).backward()
    assert_same(whole(logits), expected[share], tolerance, "logits")
    assert_same(gradients(model), gradients(one), tolerance, "gradients")


LAYOUTS = {
    "data 4, experts 4": {"dp_shard": 4, "ep": 4},
    "data 4, experts 2": {"dp_shard": 4, "ep": 2},
    "data 2 x tensor 2, experts 4": {"dp_shard": 2, "tp": 2, "ep": 4},
    "data 2 x tensor 2, experts 2": {"dp_shard": 2, "tp": 2, "ep": 2},
    "tensor 4, experts 2": {"tp": 4, "ep": 2},
    "replicas 2 x data 2, experts 2": {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.ranks(4)
def test_a_layout_trains_like_one_process(layout):
    if "tensor" in layout:
        pytest.importorskip("am_tp_plans")
    model = tiny("qwen3_moe", layers=2, num_key_value_heads=4)
    one, names = copy.deepcopy(model), list(model.state_dict())
    world, moe = build_meshes(device_type(), **LAYOUTS[layout])
    axes = AXES | ({"dp_axis_names": ("dp_replicate", "dp_shard")} if "dp_replicate" in LAYOUTS[layout] else {})
    parallelize_model(model, world, moe, **axes, activation_checkpointing=True, reshard_after_forward=True)
    assert list(model.state_dict()) == names
    data = world["dp_replicate", "dp_shard"]._flatten("all")
    step_both(model, one, data)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.ranks(8, timeout=120)
def test_ranks_that_share_key_value_heads_train_beside_spread_experts(family):
    pytest.importorskip("am_tp_plans")
    model = tiny(family, layers=2, num_key_value_heads=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), dp_shard=2, tp=4, ep=4)
    parallelize_model(model, world, moe, **AXES, activation_checkpointing=True)
    step_both(model, one, world["dp_shard"], 1e-6)  # norms are float32


@pytest.mark.ranks(4)
def test_shared_experts_are_tensor_parallel_beside_spread_ones():
    pytest.importorskip("am_tp_plans")
    model = small("deepseek_v3", first_k_dense_replace=1, layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), dp_shard=2, tp=2, ep=4)
    parallelize_model(model, world, moe, **AXES, activation_checkpointing=True, ignore_router_for_ac=True)
    shared = model.model.layers[1].mlp.shared_experts.up_proj.weight
    assert len(shared.placements) == 2
    step_both(model, one, world["dp_shard"], tolerance=1e-5)  # its router computes in float32


@pytest.mark.ranks(4)
def test_an_expert_mesh_with_a_tensor_axis_keeps_experts_apart_per_tensor_rank():
    pytest.importorskip("am_tp_plans")
    model = tiny("qwen3_moe", layers=2)
    one = copy.deepcopy(model)
    world = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp_shard", "tp"))
    moe = init_device_mesh(device_type(), (1, 2, 2), mesh_dim_names=("ep_shard", "ep", "tp"))
    parallelize_model(model, world, moe, **AXES)
    step_both(model, one, world["dp_shard"])


@pytest.mark.ranks(2)
def test_experts_stay_whole_without_an_expert_axis():
    model = tiny("mixtral", layers=2)
    one = copy.deepcopy(model)
    world, _ = build_meshes(device_type(), dp_shard=2)
    parallelize_model(model, world, None, dp_axis_names=("dp_shard",), lm_head_precision="float64")
    assert isinstance(model.lm_head, FSDPModule)
    step_both(model, one, world["dp_shard"])


@pytest.mark.ranks(2)
def test_it_can_be_bound_as_a_pipelines_parallelize_fn():
    part = tiny("mixtral", layers=2)
    one = copy.deepcopy(part)
    world, moe = build_meshes(device_type(), dp_shard=2, ep=2)
    parallelize_fn = functools.partial(parallelize_model, activation_checkpointing=True)
    assert parallelize_fn(part, world, moe, cp_axis_name="cp", **AXES) is None
    step_both(part, one, world["dp_shard"])


@pytest.mark.ranks(2)
def test_wrong_requests_are_refused_before_anything_is_sent(monkeypatch):
    world, moe = build_meshes(device_type(), dp_shard=1, tp=2, ep=2)
    model = tiny("qwen3_moe", layers=1)
    for axes, message in [
        ({"dp_axis_names": "dp_shard"}, "must be a tuple of one axis, or two for HSDP"),
        ({"dp_axis_names": ("data",)}, r"dp_axis_names: world_mesh has no axis 'data'; its axes are \('pp'"),
        ({"ep_axis_name": "tp"}, r"ep_axis_name: moe_mesh has no axis 'tp'; its axes are \('pp', 'ep_shard', 'ep'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            parallelize_model(model, world, moe, **AXES | axes)
    with pytest.raises(ValueError, match="needs moe_mesh; build_meshes makes one"):
        parallelize_model(model, world, None, **AXES)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts to spread"):
        parallelize_model(tiny("llama", layers=1), world, moe, **AXES | {"tp_axis_name": None})
    monkeypatch.setitem(sys.modules, "am_tp_plans", None)
    with pytest.raises(ImportError, match=r"pip install 'am-moe\[tp\]'"):
        parallelize_model(model, world, moe, **AXES)
    assert len(find_experts(model)) == 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 16))
def test_degrees_that_fit_are_taken_and_others_refused_with_what_would(pp, dp, tp, ep):
    degrees = {"pp": pp, "dp_shard": dp, "tp": tp}
    if (dp * tp) % ep == 0:
        check_degrees(degrees, ep, pp * dp * tp)
    else:
        with pytest.raises(ValueError, match=f"ep {ep} does not divide the {dp * tp} ranks of a pipeline stage"):
            check_degrees(degrees, ep, pp * dp * tp)
    with pytest.raises(ValueError, match=f"is {pp * dp * tp} ranks, but there are {pp * dp * tp + 1}"):
        check_degrees(degrees, ep, pp * dp * tp + 1)


@pytest.mark.ranks(4)
def test_both_meshes_are_over_the_same_ranks():
    world, moe = build_meshes(device_type(), dp_shard=2, tp=2, ep=2)
    assert world["tp"].mesh.tolist() == moe["ep"].mesh.tolist(), "experts go across neighbours"
    assert moe["ep_shard"].size() == 2
    assert sorted(moe.mesh.flatten().tolist()) == list(range(dist.get_world_size()))
    with pytest.raises(ValueError, match="tp must be at least 1, got 0"):
        build_meshes(device_type(), tp=0)


WITH_CONTEXT = {
    "experts across data and context": {"dp_shard": 2, "cp": 2, "ep": 4},
    "replicas x context": {"dp_replicate": 2, "cp": 2, "ep": 2},
    "replicas x data x context": {"dp_replicate": 2, "dp_shard": 2, "cp": 2, "ep": 4},
    "context x tensor with sequence parallelism": {"cp": 2, "tp": 2, "ep": 2},
    "context x tensor over more ranks than key heads": {"cp": 2, "tp": 4, "ep": 2},
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=pytest.mark.ranks(8 if "x data" in n or "more ranks" in n else 4)) for n in WITH_CONTEXT],
)
def test_a_layout_with_a_context_axis_trains_like_one_process(layout):
    tensor = "tensor" in layout
    if tensor:
        pytest.importorskip("am_tp_plans")
    model = tiny("qwen3_moe", layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), **WITH_CONTEXT[layout])
    axes = AXES | {"dp_axis_names": ("dp_replicate", "dp_shard"), "cp_axis_name": "cp"}
    parallelize_model(model, world, moe, **axes, activation_checkpointing=True, sequence_parallel=tensor)
    ids, _ = token_batch(4, 16)
    data = world["dp_replicate", "dp_shard"]._flatten("all")
    each = 4 // data.size()
    mine = ids[each * data.get_local_rank() : each * (data.get_local_rank() + 1)]
    model(**shard_batch({"input_ids": mine, "labels": mine}, world["cp"]), use_cache=False).loss.backward()
    one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert_same(gradients(model), gradients(one), 1e-6, "gradients")  # transformers computes the loss in float32


# The data axes of nemo-automodel are flattened ones, the context axis among them.
FLATTENED = {
    "data and context as one axis": (("dp_shard_cp",), {"dp_shard": 2, "cp": 2, "ep": 4}),
    "replicas beside data and context": (("dp_replicate", "dp_shard_cp"), {"dp_replicate": 2, "cp": 2, "ep": 2}),
    "replicas and data as one axis": (("dp",), {"dp_replicate": 2, "cp": 2, "ep": 2}),
    "no context": (("dp_replicate", "dp_shard_cp"), {"dp_replicate": 2, "dp_shard": 2, "ep": 4}),
}


@pytest.mark.parametrize("layout", FLATTENED)
@pytest.mark.ranks(4)
def test_data_axes_can_be_flattened_ones(layout):
    names, degrees = FLATTENED[layout]
    model = tiny("qwen3_moe", layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), **degrees)
    world["dp_shard", "cp"]._flatten("dp_shard_cp")
    world["dp_replicate", "dp_shard"]._flatten("dp")
    parallelize_model(model, world, moe, **AXES | {"dp_axis_names": names, "cp_axis_name": "cp"})
    ids, _ = token_batch(4, 16)
    data = world["dp"]
    each = 4 // data.size()
    mine = ids[each * data.get_local_rank() : each * (data.get_local_rank() + 1)]
    model(**shard_batch({"input_ids": mine, "labels": mine}, world["cp"]), use_cache=False).loss.backward()
    one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert_same(gradients(model), gradients(one), 1e-6, "gradients")  # transformers computes the loss in float32


@pytest.mark.ranks(4)
def test_axes_over_the_same_ranks_are_refused():
    world, moe = build_meshes(device_type(), dp_shard=2, tp=2, ep=2)
    world["dp_shard", "tp"]._flatten("dp_tp")
    for axes in ({"dp_axis_names": ("dp_tp",)}, {"dp_axis_names": ("dp_shard", "dp_tp"), "tp_axis_name": None}):
        with pytest.raises(ValueError, match=r"the axes '.*' and '.*' of .* go over the same ranks"):
            parallelize_model(tiny("qwen3_moe", layers=1), world, moe, **AXES | axes)


@pytest.mark.ranks(2)
def test_a_plan_can_be_given_and_sequence_parallelism_needs_a_tensor_axis():
    plans = pytest.importorskip("am_tp_plans")
    model = tiny("qwen3_moe", layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), tp=2, ep=2)
    plan = {key: style for key, style in plans.resolve_plan(model).items() if "self_attn" not in key}
    parallelize_model(model, world, moe, **AXES, tp_shard_plan=plan)
    assert model.model.layers[0].self_attn.q_proj.weight.placements == (Shard(0),), "over the data axis alone"
    step_both(model, one, world["dp_shard"])
    world, moe = build_meshes(device_type(), dp_shard=2, ep=2)
    with pytest.raises(ValueError, match="sequence_parallel=True needs a tensor axis of several ranks"):
        parallelize_model(tiny("qwen3_moe", layers=1), world, moe, **AXES, sequence_parallel=True)
    with pytest.raises(ValueError, match="tp_shard_plan needs a tensor axis of several ranks"):
        parallelize_model(tiny("qwen3_moe", layers=1), world, moe, **AXES, tp_shard_plan=plan)
