"""A model laid out over data and tensor axes trains like one process."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_fsdp import apply_fsdp_sharding_recursively, clip_grad_norm_, fsdp2_strategy_parallelize, unshard_fsdp2_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error
from am_testkit.models import next_token_loss, tiny, token_batch

AXES = ("data_parallel", "tensor_parallel")


def mesh_of(dp, tp=None):
    if tp is None:
        return init_device_mesh(device_type(), (dp,), mesh_dim_names=AXES[:1])
    return init_device_mesh(device_type(), (dp, tp), mesh_dim_names=AXES)


def train_both(model, whole, mesh, *, steps=3, tolerance=1e-10):
    """Train the laid-out model on its share of the batch and the whole one on all of it; compare everything."""
    dp = mesh["data_parallel"]
    size, rank = dp.size(), dp.get_local_rank()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, whole)]
    for step in range(steps):
        ids, labels = token_batch(4, 12, seed=step)
        share = slice(rank * 4 // size, (rank + 1) * 4 // size)
        logits = model(ids[share], use_cache=False).logits
        next_token_loss(logits, labels[share]).backward()
        expected = whole(ids, use_cache=False).logits
        next_token_loss(expected, labels).backward()
        assert_same(logits, expected[share], tolerance, f"logits of step {step}")
        assert_same(gradients(model), gradients(whole), tolerance, f"gradients of step {step}")
        norm = clip_grad_norm_(model.parameters(), 0.1)
        assert_same(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1), 1e-6, "norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    assert_same(dict(model.named_parameters(remove_duplicate=False)), weights, 10 * tolerance, "weights")


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
@pytest.mark.ranks(2)
def test_a_model_sharded_over_data_ranks_trains_like_one_process(family, tied, checkpointing):
    model = tiny(family, tied=tied)
    whole, names = copy.deepcopy(model), set(model.state_dict())
    mesh = mesh_of(2)
    fsdp2_strategy_parallelize(model, mesh, torch.float64, activation_checkpointing=checkpointing)
    assert set(model.state_dict()) == names
    train_both(model, whole, mesh)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen3", True)])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
@pytest.mark.ranks(4)
def test_a_model_on_a_data_and_tensor_mesh_trains_like_one_process(family, tied, sequence_parallel):
    model = tiny(family, tied=tied)
    whole, names = copy.deepcopy(model), set(model.state_dict())
    mesh = mesh_of(2, 2)
    fsdp2_strategy_parallelize(
        model, mesh, torch.float64, sequence_parallel=sequence_parallel, activation_checkpointing=sequence_parallel
    )
    assert set(model.state_dict()) == names
    train_both(model, whole, mesh)


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
@pytest.mark.ranks(8, timeout=120)
def test_ranks_that_share_key_value_heads_train_like_one_process(family):
    model = tiny(family, hidden_size=64, num_attention_heads=8, attention="sdpa", layers=2)
    whole = copy.deepcopy(model)
    mesh = mesh_of(2, 4)
    fsdp2_strategy_parallelize(model, mesh, torch.float64, sequence_parallel=True, activation_checkpointing=True)
    assert model.model.layers[0].self_attn.num_key_value_groups == 2
    train_both(model, whole, mesh, steps=2, tolerance=1e-4)  # float32 in norms, whose rounding AdamW enlarges


@pytest.mark.ranks(2)
def test_a_data_axis_of_one_rank_beside_a_tensor_axis_trains_like_one_process():
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    mesh = mesh_of(1, 2)
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    train_both(model, whole, mesh)


@pytest.mark.ranks(2)
def test_a_model_from_meta_holds_only_its_shards():
    with torch.device("meta"):
        model = tiny("llama")
    whole = tiny("llama")
    mesh = mesh_of(2)
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device_type())
    held = sum(p.to_local().numel() for p in model.parameters())
    assert held <= sum(p.numel() for p in whole.parameters()) / 2 + 64
    with torch.no_grad():
        for (_, shard), value in zip(model.named_parameters(), whole.parameters(), strict=True):
            shard.copy_(distribute_tensor(value, shard.device_mesh, shard.placements))
        for mine, theirs in zip(model.buffers(), whole.buffers(), strict=True):
            mine.copy_(theirs)
    train_both(model, whole, mesh, steps=1)


@pytest.mark.ranks(2)
def test_bfloat16_compute_stays_near_a_bfloat16_process():
    model = tiny("llama", dtype=torch.float32)
    whole = copy.deepcopy(model).to(torch.bfloat16)
    fsdp2_strategy_parallelize(model, mesh_of(2))
    ids, labels = token_batch(4, 12)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    logits = model(ids[share], use_cache=False).logits
    expected = whole(ids, use_cache=False).logits
    assert relative_error(logits.float(), expected[share].float()) < 2e-2
    next_token_loss(logits, labels[share]).backward()
    next_token_loss(expected, labels).backward()
    reduced = {n: g.to(torch.float32) for n, g in gradients(model).items()}
    assert_same(reduced, {n: g.float() for n, g in gradients(whole).items()}, 6e-2, "gradients")


@pytest.mark.ranks(2)
def test_frozen_parameters_stay_frozen_and_get_no_gradient():
    model = tiny("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name)
    whole = copy.deepcopy(model)
    mesh = mesh_of(2)
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    train_both(model, whole, mesh, steps=1)
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.ranks(2)
def test_units_are_the_layers_and_absent_layers_are_passed_over():
    model = tiny("llama")
    model.model.layers[1] = nn.Identity()
    apply_fsdp_sharding_recursively(model, mesh_of(2), None)
    assert [isinstance(layer, FSDPModule) for layer in model.model.layers] == [True, False, True, True]
    assert not isinstance(model.model.norm, FSDPModule)


@pytest.mark.ranks(2)
def test_unsharding_is_undone_as_it_was_also_by_an_exception():
    model = tiny("llama")
    fsdp2_strategy_parallelize(model, mesh_of(2), torch.float64)
    ids, _ = token_batch(2, 8)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for module in model.modules():  # some stay whole after a forward
            if isinstance(module, FSDPModule):
                module.reshard()
        with unshard_fsdp2_model(model):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            with unshard_fsdp2_model(model):  # what is unsharded already stays so on leaving the inner context
                pass
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            assert_same(model(ids, use_cache=False).logits, expected, 0.0, "logits")
    with pytest.raises(KeyError), unshard_fsdp2_model(model):
        raise KeyError
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.ranks(4)
def test_the_norm_counts_every_element_once_over_plain_tensors_and_different_meshes(norm_type):
    torch.manual_seed(0)
    values = [torch.randn(8, 4) for _ in range(4)]
    world = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("a", "b"))
    flat = init_device_mesh(device_type(), (4,))
    layouts = [(world, [Shard(0), Shard(1)]), (world["b"], [Shard(1)]), (flat, [Shard(0)]), None]
    parameters = []
    for value, layout in zip(values, layouts, strict=True):
        gradient = value if layout is None else distribute_tensor(value, *layout)
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        parameters.append(parameter)
    whole = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for parameter, value in zip(whole, values, strict=True):
        parameter.grad = value.clone()
    expected = torch.nn.utils.clip_grad_norm_(whole, 0.5, norm_type=norm_type)
    assert_same(clip_grad_norm_(parameters, 0.5, norm_type=norm_type), expected, 1e-6, "norm")
    for mine, theirs in zip(parameters, whole, strict=True):
        assert_same(mine.grad, theirs.grad, 1e-6, "clipped gradient")


@pytest.mark.ranks(2)
def test_copies_of_a_tied_weight_count_once_and_pipeline_ranks_add_up():
    mine, twin = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    mine.grad = torch.full((3,), 2.0 + dist.get_rank())
    twin.grad = torch.ones(4)
    norm = clip_grad_norm_([mine, twin], 1.0, pipeline_shards=2, duplicates=[twin] if dist.get_rank() else [])
    assert norm.item() == pytest.approx(math.sqrt(3 * 4 + 3 * 9 + 4))
    assert twin.grad[0].item() == pytest.approx(1 / norm.item(), rel=1e-5)


@pytest.mark.ranks(2)
def test_a_norm_that_is_not_finite_is_an_error_on_every_rank():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, math.nan if dist.get_rank() else 1.0])
    for given, name in (([parameter], "parameter 0"), ([("up.weight", parameter)], r"up\.weight")):
        with pytest.raises(RuntimeError, match=f"on this rank: {name if dist.get_rank() else 'none'}"):
            clip_grad_norm_(given, 1.0, error_if_nonfinite=True)
    assert parameter.grad[0] == 1.0, "nothing is scaled"


@pytest.mark.ranks(1)
def test_two_parameters_of_one_name_both_count_and_an_error_names_a_few():
    """Parts of a pipeline keep the model's names, and a tied weight may be in two of them."""
    pairs = [("embed.weight", nn.Parameter(torch.zeros(1))) for _ in range(2)]
    for _, parameter in pairs:
        parameter.grad = torch.tensor([3.0])
    assert clip_grad_norm_(pairs, 1.0).item() == pytest.approx(math.sqrt(18))
    assert pairs[0][1].grad.item() == pairs[1][1].grad.item() == pytest.approx(3 / math.sqrt(18), rel=1e-5)
    pairs = [(f"layers.{i}.weight", pairs[0][1]) for i in range(11)]
    pairs[0][1].grad = torch.tensor([math.nan])
    with pytest.raises(RuntimeError, match=r"layers\.0\.weight, .*layers\.7\.weight and 3 more$"):
        clip_grad_norm_(pairs, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dp_mesh_name": "dp"}, "no data axis 'dp'; it has"),
        ({"sequence_parallel": True}, "sequence_parallel=True needs a tensor axis"),
        ({"tp_shard_plan": {}}, "tp_shard_plan needs a tensor axis"),
    ],
)
@pytest.mark.ranks(2)
def test_a_wrong_request_is_refused_on_every_rank(settings, words):
    with pytest.raises(ValueError, match=words):
        fsdp2_strategy_parallelize(tiny("llama"), mesh_of(2), **settings)


def two_dtypes(model):
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32, dtype=torch.float32))


def sharded_layer(model):
    fully_shard(model.model.layers[1], mesh=init_device_mesh(device_type(), (2,)))


@pytest.mark.parametrize(
    ("settings", "damage", "words"),
    [
        ({"activation_checkpointing": "every other"}, None, "activation checkpointing must be"),
        ({"activation_checkpointing": 0}, None, "activation checkpointing must be"),
        ({"tp_shard_plan": "no.such.plan"}, None, "no"),
        ({"param_dtype": torch.int8}, None, "param_dtype must be a floating-point"),
        ({"param_dtype": "bfloat16"}, None, "param_dtype must be a floating-point"),
        ({"mp_policy": torch.bfloat16}, None, "mp_policy must be a MixedPrecisionPolicy"),
        ({"offload_policy": True}, None, "offload_policy must be an OffloadPolicy"),
        ({}, two_dtypes, "q_proj holds parameters of"),
        ({}, sharded_layer, r"model\.layers\.1 is an FSDP2 unit already"),
    ],
)
@pytest.mark.ranks(2)
def test_a_request_is_refused_before_the_first_parameter_is_touched(settings, damage, words):
    model = tiny("llama")
    model.config.use_cache = True
    if damage is not None:
        damage(model)
    before = {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()}
    forwards = [module.forward for module in model.modules()]
    with pytest.raises((ValueError, TypeError), match=words):
        fsdp2_strategy_parallelize(model, mesh_of(1, 2), **settings)
    assert {name: (parameter, type(parameter)) for name, parameter in model.named_parameters()} == before
    assert [module.forward for module in model.modules()] == forwards
    assert model.config.use_cache is True


class Collectives(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.ranks(2)
def test_heads_that_do_not_fit_are_refused_before_the_first_collective():
    model = tiny("llama", hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    mesh = mesh_of(1, 2)
    with Collectives() as collectives, pytest.raises(ValueError, match=r"heads=9 .* 2 tensor-parallel ranks; .*1, 3"):
        fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert collectives.seen == []
    with Collectives() as collectives:
        fsdp2_strategy_parallelize(tiny("llama"), mesh, torch.float64)
    assert collectives.seen


@pytest.mark.ranks(2)
def test_a_tensor_axis_that_nothing_would_use_is_refused():
    mesh = init_device_mesh(device_type(), (1, 2), mesh_dim_names=("data_parallel", "tp"))
    with pytest.raises(ValueError, match=r"a tensor axis 'tp' of 2 ranks, but nothing would use it.*tp_mesh_name='tp'"):
        fsdp2_strategy_parallelize(tiny("llama"), mesh)


@pytest.mark.ranks(2)
def test_experts_that_are_spread_over_the_data_ranks_are_not_sharded_again():
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(
        distribute_tensor(model.weight.detach(), init_device_mesh(device_type(), (2,)), [Shard(0)])
    )
    with pytest.raises(ValueError, match=r"weight is already distributed .* am_moe\.apply_fsdp"):
        fsdp2_strategy_parallelize(model, mesh_of(2))


@pytest.mark.ranks(2)
def test_the_private_state_that_unsharding_reads_is_still_there():
    from am_fsdp._torch_compat import is_unsharded

    module = fully_shard(nn.Linear(4, 4), mesh=mesh_of(2), mp_policy=MixedPrecisionPolicy())
    assert not is_unsharded(module)
    module.unshard()
    assert is_unsharded(module)
    module.reshard()
    assert not is_unsharded(module)
