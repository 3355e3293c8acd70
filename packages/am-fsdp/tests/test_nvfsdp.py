"""What nvFSDP's arguments mean to megatron-fsdp, without a GPU; `test_gpu.py` trains with it."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import megatron_fsdp
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import am_fsdp
from am_fsdp import HAVE_NVFSDP, nvfsdp_strategy_parallelize
from am_fsdp.layout.nvfsdp import STRATEGIES, nvfsdp_arguments, sharding_mesh, unit_classes
from am_fsdp.layout.optimizer_groups import OptimizerGroups, check_gradients_before_step, without_update
from am_testkit.device import device_type
from am_testkit.models import tiny

DEFAULTS = {
    "data_parallel_sharding_strategy": "optim_grads_params",
    "init_nvfsdp_with_meta_device": False,
    "grad_reduce_in_fp32": False,
    "preserve_fp32_weights": False,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "average_in_collective": False,
    "disable_bucketing": False,
    "calculate_per_token_loss": False,
    "keep_fp8_transpose_cache_when_using_custom_fsdp": False,
    "nccl_ub": False,
    "fsdp_double_buffer": False,
}


def test_every_translated_argument_is_one_that_megatron_fsdp_takes():
    accepted = inspect.signature(megatron_fsdp.fully_shard_model).parameters
    policy = inspect.signature(megatron_fsdp.MixedPrecisionPolicy).parameters
    arguments = nvfsdp_arguments(**DEFAULTS)
    assert set(arguments) <= set(accepted)
    assert set(arguments["mixed_precision_policy"]) == set(policy)
    assert {"device_mesh", "dp_shard_dim", "tp_dim", "fsdp_unit_modules"} <= set(accepted)


def test_the_defaults_are_the_documented_ones():
    documented = inspect.signature(nvfsdp_strategy_parallelize).parameters
    assert {name: documented[name].default for name in DEFAULTS} == DEFAULTS
    assert documented["check_for_nan_in_grad"].default is True


@pytest.mark.parametrize("number", range(4))
def test_strategies_have_names_and_numbers(number):
    arguments = nvfsdp_arguments(**DEFAULTS | {"data_parallel_sharding_strategy": number})
    assert arguments == nvfsdp_arguments(**DEFAULTS | {"data_parallel_sharding_strategy": STRATEGIES[number]})
    assert arguments["zero_dp_strategy"] == STRATEGIES[number]


def test_float32_reduction_and_weights_are_a_precision_policy():
    policy = nvfsdp_arguments(**DEFAULTS | {"grad_reduce_in_fp32": True})["mixed_precision_policy"]
    assert policy == {
        "main_params_dtype": None,
        "main_grads_dtype": torch.float32,
        "grad_comm_dtype": torch.float32,
    }
    policy = nvfsdp_arguments(**DEFAULTS | {"preserve_fp32_weights": True})["mixed_precision_policy"]
    assert policy == {"main_params_dtype": torch.float32, "main_grads_dtype": None, "grad_comm_dtype": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_sharding_strategy": "params"}, "'params' is none of .* parameters alone are never sharded"),
        ({"data_parallel_sharding_strategy": "grads_params"}, "never sharded without the optimizer"),
        ({"data_parallel_sharding_strategy": 4}, "=4 is none of"),
        ({"data_parallel_sharding_strategy": True}, "=True is none of"),
        (
            {"data_parallel_sharding_strategy": "no_shard", "init_nvfsdp_with_meta_device": True},
            "needs a sharding strategy other than 'no_shard'",
        ),
        ({"overlap_grad_reduce": False}, "overlap_grad_reduce=False has no effect with 'optim_grads_params'"),
        ({"overlap_param_gather": False}, "overlap_param_gather=False has no effect with 'optim_grads_params'"),
    ],
)
def test_what_has_no_meaning_today_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        nvfsdp_arguments(**DEFAULTS | arguments)


def test_units_are_named_by_class_or_by_import_path():
    model = tiny("llama")
    layer = type(model.model.layers[0])
    assert unit_classes(model, None) is None
    assert unit_classes(model, ["LlamaDecoderLayer"]) == [layer]
    assert unit_classes(model, [f"{layer.__module__}.LlamaDecoderLayer", "torch.nn.Embedding"]) == [layer, nn.Embedding]
    for wrong in ("Qwen3DecoderLayer", "torch.nn.Conv1d", "torch.nn.functional.linear"):
        with pytest.raises(ValueError, match=rf"no module of LlamaForCausalLM is a '{wrong}'; it has .*LlamaMLP"):
            unit_classes(model, [wrong])


def test_the_error_without_megatron_fsdp_names_the_extra():
    script = """
import sys
sys.modules["megatron_fsdp"] = None
import am_fsdp
assert am_fsdp.HAVE_NVFSDP is False
try:
    am_fsdp.nvfsdp_strategy_parallelize(None, None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "nvfsdp_strategy_parallelize needs megatron-fsdp: pip install am-fsdp[megatron]\n"
    assert HAVE_NVFSDP is True


@pytest.mark.ranks(2)
def test_bad_requests_are_refused_on_every_rank():
    model = tiny("llama")
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    stepped = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    stepped.step()
    other = torch.optim.SGD(tiny("llama").parameters())
    with torch.device("meta"):
        on_meta = type(model)(model.config)
    for arguments, message in (
        ({}, "works on CUDA alone, but device_mesh is on 'cpu'; use fsdp2_strategy_parallelize"),
        ({"dp_mesh_name": "dp"}, "no data axis 'dp'; it has"),
        ({"tp_shard_plan": {}}, "needs a tensor axis, but device_mesh has no 'tensor_parallel'"),
        ({"optimizer": stepped}, "has state already, which sharding would lose"),
        ({"optimizer": other}, "parameter 0 of group 0 of the optimizer is none of LlamaForCausalLM's"),
        ({"nvfsdp_unit_modules": ["Layer"]}, "no module of LlamaForCausalLM is a 'Layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            nvfsdp_strategy_parallelize(model, mesh, **arguments)
    with pytest.raises(ValueError, match=r"norm is a LlamaRMSNorm on meta without reset_parameters\(\)"):
        nvfsdp_strategy_parallelize(on_meta, mesh, init_nvfsdp_with_meta_device=True)


@pytest.mark.ranks(4)
def test_data_and_context_ranks_share_one_axis_that_megatron_fsdp_finds():
    names = ("pp", "data_parallel", "context_parallel", "tensor_parallel")
    for shape in ((1, 2, 2, 1), (1, 1, 2, 2), (2, 1, 2, 1), (1, 4, 1, 1)):
        mesh = init_device_mesh(device_type(), shape, mesh_dim_names=names)
        joined, name = sharding_mesh(mesh, "data_parallel", "context_parallel")
        index = megatron_fsdp.FSDPDistributedIndex(joined, dp_shard_dim=name, tp_dim="tensor_parallel")
        group = index.get_fsdp_group()
        pp, _, _, tp = mesh.get_coordinate()
        expected = mesh.mesh[pp, :, :, tp].flatten().tolist()
        assert dist.get_process_group_ranks(group) == expected


def test_an_optimizer_keeps_its_groups_over_other_parameters():
    model = tiny("llama")
    optimizer = in_groups(model)
    groups = OptimizerGroups.of(model, optimizer)
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    other = tiny("llama")
    groups.move_to(optimizer, dict(other.named_parameters()))
    after = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert after == before
    assert [g["weight_decay"] for g in after] == [0.5, 0.0]
    for group, names in zip(optimizer.param_groups, groups.groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(dict(other.named_parameters())[n]) for n in names]


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "RMSprop"])
def test_a_step_that_makes_the_state_changes_nothing(kind):
    """As megatron-fsdp does: zero gradients, one step; then training is what it would have been without."""
    ours, plain = tiny("llama"), tiny("llama")
    settings = {"lr": 0.1, "weight_decay": 0.5} | ({"momentum": 0.9} if kind == "SGD" else {})
    optimizers = [getattr(torch.optim, kind)(model.parameters(), **settings) for model in (ours, plain)]
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with without_update(optimizers[0]):
        optimizers[0].step()
    for seed, (model, optimizer) in itertools.product(range(2), zip((ours, plain), optimizers, strict=True)):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_step():
    model = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    check_gradients_before_step(optimizer, OptimizerGroups.of(model, optimizer).names)
    before = model.lm_head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 1:
        model.model.norm.weight.grad[3] = torch.inf
    where = "model.norm.weight" if dist.get_rank() == 1 else "none"
    with pytest.raises(RuntimeError, match=f"gradients are not finite; on this rank: {where}$"):
        optimizer.step()
    assert torch.equal(model.lm_head.weight, before)
    model.model.norm.weight.grad.fill_(1.0)
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0, "lr": 0.01}], lr=0.1
    )


def test_the_names_are_public():
    assert {"nvfsdp_strategy_parallelize", "HAVE_NVFSDP"} <= set(am_fsdp.__all__)
