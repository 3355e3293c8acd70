"""Meshes, units and recomputation, each against one process."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from am_fsdp import checkpoint_layers, clip_grad_norm_, fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small

MODES = [True, "full", 2, "selective", "mlp"]


def step(model, whole, mesh, names, tolerance=1e-10):
    """One step of each on the same batch, laid out over the data axes; logits, gradients and norm compared."""
    data = mesh[names] if isinstance(names, str) else mesh[names]._flatten()
    ids, labels = token_batch(4, 8, vocab_size=60)
    share = slice(data.get_local_rank() * 4 // data.size(), (data.get_local_rank() + 1) * 4 // data.size())
    logits, expected = model(ids[share], use_cache=False).logits, whole(ids, use_cache=False).logits
    assert_same(logits, expected[share], tolerance, "logits")
    next_token_loss(logits, labels[share]).backward()
    next_token_loss(expected, labels).backward()
    assert_same(gradients(model), gradients(whole), tolerance, "gradients")
    norms = clip_grad_norm_(model.parameters(), 0.1), torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    assert_same(*norms, 1e-6, "norm")


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.ranks(4)
def test_hybrid_shards_are_replicated_over_the_first_axis(tied):
    model = tiny("qwen3", tied=tied)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "shards"))
    fsdp2_strategy_parallelize(model, mesh, torch.float64, dp_mesh_name=("replicas", "shards"))
    assert model.model.layers[0].mlp.up_proj.weight.to_local().shape == (24, 32)
    step(model, whole, mesh, ("replicas", "shards"))


@pytest.mark.ranks(4)
def test_hybrid_shards_may_be_over_a_flattened_axis():
    model = tiny("llama")
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 1, 2), mesh_dim_names=("copies", "data", "context"))
    mesh["data", "context"]._flatten("data_context")
    fsdp2_strategy_parallelize(model, mesh, torch.float64, dp_mesh_name=("copies", "data_context"))
    assert model.model.layers[0].mlp.up_proj.weight.to_local().shape == (24, 32)
    step(model, whole, mesh, ("copies", "data", "context"))


@pytest.mark.ranks(4)
def test_hybrid_shards_beside_a_tensor_axis_under_other_names():
    model = tiny("llama")
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (1, 2, 2), mesh_dim_names=("r", "s", "t"))
    fsdp2_strategy_parallelize(
        model, mesh, torch.float64, dp_mesh_name=("r", "s"), tp_mesh_name="t", sequence_parallel=True
    )
    step(model, whole, mesh, "s")


@pytest.mark.parametrize("name", ["mistral", "gpt2", "deepseek_v3"])
@pytest.mark.ranks(4, timeout=120)
def test_derived_and_inferred_plans_compose_with_data_parallelism(name):
    from am_tp_plans import add_sequence_parallelism, infer_plan, resolve_plan

    model = small(name)
    whole = copy.deepcopy(model)
    plan = add_sequence_parallelism(model, infer_plan(model)) if name == "gpt2" else None
    plan = plan or resolve_plan(model, sequence_parallel=True)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    fsdp2_strategy_parallelize(model, mesh, torch.float64, tp_shard_plan=plan, activation_checkpointing=True)
    step(model, whole, mesh, "data_parallel", tolerance=1e-6)


@pytest.mark.ranks(2)
def test_embedding_and_head_are_units_unless_they_are_one_parameter():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    for tied in (False, True):
        model = tiny("llama", tied=tied)
        fsdp2_strategy_parallelize(model, mesh, torch.float64)
        units = [isinstance(m, FSDPModule) for m in (model.model.embed_tokens, model.model.norm, model.lm_head)]
        assert units == [not tied] * 3
    model = tiny("llama")
    model.model.norm = torch.nn.Identity()  # a pipeline stage without the end
    model.lm_head = torch.nn.Identity()
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert isinstance(model.model.embed_tokens, FSDPModule)


@pytest.mark.ranks(2)
def test_a_module_of_another_dtype_is_a_unit_that_keeps_it_and_two_in_one_are_refused():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.input_layernorm.float()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    step(model, whole, mesh, "data_parallel", tolerance=1e-6)
    model = tiny("qwen2")
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj holds parameters of .*float32"):
        fsdp2_strategy_parallelize(model, mesh, torch.float64)


class WideHead(torch.nn.Linear):
    """What a float32 head in a bfloat16 model computes."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class WideNorm(torch.nn.Module):
    """What a float32 norm in a bfloat16 model computes for the layers behind it."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon, self.kind = norm.weight, norm.variance_epsilon, type(norm)

    def forward(self, x):
        return self.kind.forward(self, x).to(torch.bfloat16)


@pytest.mark.parametrize("which", ["head", "final norm", "norms", "head and norm", "tied ends", "embedding"])
@pytest.mark.parametrize("kept", [False, True], ids=["", "no policy"])
@pytest.mark.ranks(2)
def test_float32_parts_of_a_bfloat16_model_are_trained_in_float32(which, kept):
    model = tiny("llama", dtype=torch.bfloat16, tied=which == "tied ends")
    whole = copy.deepcopy(model)
    for each, is_reference in ((model, False), (whole, True)):
        backbone = each.model
        if "head" in which or "ends" in which:
            each.lm_head.float()
            each.lm_head.__class__ = WideHead if is_reference else each.lm_head.__class__
        if which == "tied ends" and is_reference:  # one unit casts what either of them returns
            each.lm_head.register_forward_hook(lambda _module, _arguments, out: out.to(torch.bfloat16))
        if which == "embedding":
            backbone.embed_tokens.float()
        if which in ("tied ends", "embedding") and is_reference:
            backbone.embed_tokens.register_forward_hook(lambda _module, _arguments, out: out.to(torch.bfloat16))
        if "norm" in which:
            backbone.norm.float()
            backbone.norm = WideNorm(backbone.norm) if is_reference else backbone.norm
        if which == "norms":
            for layer in backbone.layers:
                layer.input_layernorm.float()
                layer.input_layernorm = WideNorm(layer.input_layernorm) if is_reference else layer.input_layernorm
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if kept else None
    fsdp2_strategy_parallelize(model, mesh, torch.bfloat16, mp_policy=policy)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in whole.named_parameters()}
    ids, labels = token_batch(4, 8, vocab_size=60)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    logits, expected = model(ids[share], use_cache=False).logits, whole(ids, use_cache=False).logits
    assert logits.dtype == expected.dtype
    assert_same(logits.float(), expected[share].float(), 1e-2, "logits")
    next_token_loss(logits.float(), labels[share]).backward()
    next_token_loss(expected.float(), labels).backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    mine, theirs = ({n: g.float() for n, g in gradients(m).items()} for m in (model, whole))
    assert_same(mine, theirs, 6e-2, "gradients")


@pytest.mark.ranks(2)
def test_layers_that_share_parameters_stay_with_the_root():
    model = tiny("llama")
    model.model.layers[3].mlp = model.model.layers[1].mlp
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert [isinstance(layer, FSDPModule) for layer in model.model.layers] == [True, False, True, False]
    step(model, whole, mesh, "data_parallel")


@pytest.mark.parametrize("communicates", [False, True], ids=["at the end", "each time"])
@pytest.mark.ranks(4)
def test_gradients_are_accumulated_over_microbatches(communicates):
    model = tiny("qwen3")
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    fsdp2_strategy_parallelize(model, mesh, torch.float64, sequence_parallel=True)
    ids, labels = token_batch(8, 8)
    next_token_loss(whole(ids, use_cache=False).logits, labels).backward()
    rank = mesh["data_parallel"].get_local_rank()
    for index, start in enumerate((4 * rank, 4 * rank + 2)):
        model.set_requires_gradient_sync(communicates or index == 1)
        loss = next_token_loss(model(ids[start : start + 2], use_cache=False).logits, labels[start : start + 2])
        (loss / 2).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


class Products(TorchDispatchMode):
    """How many matrix products and elementwise products run."""

    def __init__(self):
        super().__init__()
        self.matrix = self.other = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.matrix += name in ("aten::mm", "aten::addmm", "aten::bmm")
        self.other += name in ("aten::silu", "aten::mul", "aten::rsqrt")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.ranks(2)
def test_what_is_recomputed_gives_the_same_and_is_what_was_asked_for(mode):
    model = tiny("llama")
    whole = copy.deepcopy(model)
    counts = {}
    for label, each in (("kept", copy.deepcopy(model)), ("recomputed", copy.deepcopy(model))):
        checkpoint_layers(each, mode if label == "recomputed" else False)
        loss = next_token_loss(each(token_batch(2, 8)[0], use_cache=False).logits, token_batch(2, 8)[1])
        with Products() as counted:
            loss.backward()
        counts[label] = counted
    again = counts["recomputed"].matrix - counts["kept"].matrix
    assert again == {True: 32, "full": 32, 2: 16, "selective": 0, "mlp": 8}[mode], "all but a last one of each"
    assert counts["recomputed"].other > counts["kept"].other
    mesh = init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    model.config.use_cache = True
    fsdp2_strategy_parallelize(model, mesh, torch.float64, activation_checkpointing=mode)
    assert model.config.use_cache is False
    step(model, whole, mesh, "data_parallel")


@pytest.mark.parametrize(
    ("mode", "words"),
    [("half", "must be a bool, a positive int or one of"), (0, "got 0"), (-1, "got -1"), (None, "got None")],
)
def test_an_unknown_mode_is_refused(mode, words):
    with pytest.raises(ValueError, match=words):
        checkpoint_layers(tiny("llama", layers=1), mode)


def test_layers_that_share_keys_and_values_or_have_no_mlp_are_refused():
    model = tiny("llama", layers=1)
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match=r"shares keys and values between layers \(num_kv_shared_layers=1\)"):
        checkpoint_layers(model)
    with pytest.raises(ValueError, match="Sequential has nothing to recompute"):
        checkpoint_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), "mlp")


@pytest.mark.ranks(4)
def test_axes_that_are_missing_are_named():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "shards"))
    with pytest.raises(ValueError, match=r"no data axis \('replicas', 'parts'\); it has"):
        fsdp2_strategy_parallelize(tiny("llama"), mesh, dp_mesh_name=("replicas", "parts"))


@pytest.mark.ranks(4)
def test_parameters_are_sharded_over_data_and_context_ranks_together():
    model = tiny("llama")
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("data_parallel", "context_parallel"))
    mesh._flatten("dp_cp")
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert model.model.layers[0].mlp.up_proj.weight.to_local().shape == (12, 32)
    step(model, whole, mesh, ("data_parallel", "context_parallel"))


@pytest.mark.ranks(2)
def test_shards_in_cpu_memory_train_the_same():
    model = tiny("llama")
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    fsdp2_strategy_parallelize(model, mesh, torch.float64, cpu_offload=True)
    step(model, whole, mesh, "data_parallel")


class Adapted(torch.nn.Module):
    """A frozen linear layer with a float32 adapter beside it, as peft makes them over a bfloat16 model."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Linear(base.in_features, 4, bias=False, dtype=torch.float32)
        self.up = torch.nn.Linear(4, base.out_features, bias=False, dtype=torch.float32)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


@pytest.mark.ranks(2)
def test_adapters_over_a_frozen_model_share_its_units_and_keep_their_dtype():
    model = tiny("llama", dtype=torch.bfloat16).requires_grad_(False)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    fsdp2_strategy_parallelize(model, mesh, torch.bfloat16)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert not any("mlp" in name or "self_attn" in name for name in units)
    assert sum(p.grad is None for p in model.parameters()) == len(list(model.parameters()))
    step(model, whole, mesh, "data_parallel", tolerance=1e-4)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.ranks(2)
def test_a_layer_gathers_the_next_one_before_it_computes():
    class Order(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("c10d::_allgather_base_", "aten::silu"):
                self.seen.append(func._schema.name.rpartition(":")[2])
            return func(*args, **(kwargs or {}))

    model = tiny("llama")
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    fsdp2_strategy_parallelize(model, mesh, torch.float64)
    with Order() as order, torch.no_grad():
        model(token_batch(2, 8)[0], use_cache=False)
    gathers = [sum(s == "_allgather_base_" for s in order.seen[:i]) for i, s in enumerate(order.seen) if s == "silu"]
    assert [later - earlier for earlier, later in itertools.pairwise(gathers)] == [1, 1, 0]
    assert gathers[0] == 3, "the embedding and two layers"
