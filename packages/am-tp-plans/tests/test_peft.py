"""Models with adapters of peft: tensor and sequence parallel, eager and compiled."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small
from am_tp_plans import add_sequence_parallelism, apply_plan, get_hf_tp_shard_plan, infer_plan, resolve_plan
from am_tp_styles import use_tp_linear

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]


def wrapped(family, dora=False, layers=2):
    model = get_peft_model(tiny(family, layers=layers), LoraConfig(r=3, target_modules=LINEARS, use_dora=dora)).double()
    torch.manual_seed(1)
    with torch.no_grad():  # an adapter starts at zero, which would leave lora_A without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(std=0.1)
    return model


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


@pytest.mark.parametrize(
    ("family", "sequence_parallel", "compiled"),
    [
        *itertools.product(["llama", "qwen3"], [False, True], [""]),
        ("llama", False, "layers"),
        ("qwen3", True, "layers"),
        ("llama", True, "model"),
    ],
)
@pytest.mark.ranks(2, timeout=180)
def test_a_wrapped_model_trains_as_in_one_process(family, sequence_parallel, compiled):
    model = wrapped(family, dora=not compiled, layers=1 if compiled else 2)
    reference = copy.deepcopy(model)
    base = model.get_base_model()
    if compiled:
        use_tp_linear(base)
    apply_plan(base, axis(), resolve_plan(base, sequence_parallel=sequence_parallel))
    for part in {"": [], "layers": base.model.layers, "model": [base]}[compiled]:
        part.compile(backend="aot_eager")
    optimizers = [
        torch.optim.AdamW((p for p in m.parameters() if p.requires_grad), lr=1e-2, foreach=False)
        for m in (model, reference)
    ]
    for step in range(2):
        ids, labels = token_batch(2, 12, seed=step)
        outputs = [each(ids, use_cache=False).logits for each in (model, reference)]
        assert_same(*outputs, 1e-8, f"logits of step {step}")
        for output in outputs:
            next_token_loss(output, labels).backward()
        assert_same(gradients(model), gradients(reference), 1e-8, f"gradients of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    mine = {name: whole(value) for name, value in get_peft_model_state_dict(model).items()}
    assert_same(mine, get_peft_model_state_dict(reference), 1e-6, "the adapter")


@pytest.mark.parametrize("name", ["mistral", "opt"])
@pytest.mark.ranks(2)
def test_plans_that_are_brought_or_inferred_take_adapters_too(name):
    plain = small(name)
    plan = get_hf_tp_shard_plan(plain) if name == "mistral" else infer_plan(plain)
    plan = add_sequence_parallelism(plain, plan) if name == "mistral" else plan
    targets = ["q_proj", "v_proj", "down_proj" if name == "mistral" else "fc2"]
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=targets)).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if "lora_B" in key else None
    reference = copy.deepcopy(model)
    apply_plan(model.get_base_model(), axis(), plan)
    ids, labels = token_batch(2, 12, vocab_size=60)
    for each in (model, reference):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(reference), 1e-5, "gradients")


def adapted(family, tied=False, **config):
    model = tiny(family, layers=2, tied=tied)
    torch.manual_seed(2)
    settings = {"r": 3, "target_modules": ["q_proj", "down_proj"]} | config
    model = get_peft_model(model, LoraConfig(**settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


BESIDE_LORA = {
    "head": {"modules_to_save": ["lm_head"]},
    "head and embedding": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms and keys": {"modules_to_save": ["norm", "input_layernorm", "k_proj"]},
    "rows": {"trainable_token_indices": [3, 4, 40]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("beside", "tied"), [*((name, False) for name in BESIDE_LORA), ("embedding", True), ("rows", True), ("head", True)]
)
@pytest.mark.ranks(2, timeout=180)
def test_what_peft_trains_beside_lora_trains_as_in_one_process(beside, tied, family, sequence_parallel):
    model, one = (adapted(family, tied, **BESIDE_LORA[beside]) for _ in range(2))
    base = model.get_base_model()
    plan = resolve_plan(base, sequence_parallel=sequence_parallel)
    apply_plan(base, axis(), plan)
    sharded = [name for name, parameter in base.named_parameters() if hasattr(parameter, "placements")]
    if beside == "head" and not tied:
        assert {"lm_head.original_module.weight", "lm_head.modules_to_save.default.weight"} <= set(sharded)
    ids, labels = token_batch(2, 12)
    outputs = [each(ids, use_cache=False).logits for each in (model, one)]
    assert_same(*outputs, 1e-8, "logits")
    for output in outputs:
        next_token_loss(output, labels).backward()
    assert_same(gradients(model), gradients(one), 1e-8, "gradients")
    with model.disable_adapter(), one.disable_adapter(), torch.no_grad():
        assert_same(*(each(ids, use_cache=False).logits for each in (model, one)), 1e-8, "without adapters")


@pytest.mark.ranks(2)
def test_a_plan_that_shards_a_weight_of_which_rows_are_trained_is_refused_with_the_remedy():
    plan = resolve_plan(tiny("llama", layers=2))
    base = adapted("llama", trainable_token_indices=[3]).get_base_model()
    with pytest.raises(TypeError, match=r"embed_tokens trains single rows \(peft's trainable_tok.*leave it"):
        apply_plan(base, axis(), plan)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("ia3", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
        ("loha", LoHaConfig(r=2, target_modules=["k_proj"])),
        ("vera", VeraConfig(r=2, target_modules=["q_proj"])),
        ("oft", OFTConfig(oft_block_size=4, target_modules=["q_proj"])),
    ],
)
def test_other_adapters_than_lora_are_refused_by_name(kind, config, family):
    base = get_peft_model(tiny(family, layers=2), copy.deepcopy(config)).get_base_model()
    with pytest.raises(ValueError, match=rf"an adapter layer peft\.tuners\.{kind}\..* only LoRA"):
        resolve_plan(base)


@pytest.mark.ranks(2)
def test_a_fused_linear_with_an_adapter_is_refused_before_anything_is_sharded():
    model = tiny("phi3", layers=1)
    plan = resolve_plan(model)
    base = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj"])).get_base_model()
    with pytest.raises(TypeError, match=r"self_attn\.qkv_proj.* is a .*PackedColwiseParallel, which has no LoRA form"):
        apply_plan(base, axis(), plan)
    assert not any(hasattr(p, "placements") for p in base.parameters())
