"""Models with adapters of peft: tensor and sequence parallel, eager and compiled."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
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


@pytest.mark.ranks(2)
def test_a_fused_linear_with_an_adapter_is_refused_before_anything_is_sharded():
    model = tiny("phi3", layers=1)
    plan = resolve_plan(model)
    base = get_peft_model(model, LoraConfig(r=2, target_modules=["qkv_proj"])).get_base_model()
    with pytest.raises(TypeError, match=r"self_attn\.qkv_proj.* is a .*PackedColwiseParallel, which has no LoRA form"):
        apply_plan(base, axis(), plan)
    assert not any(hasattr(p, "placements") for p in base.parameters())
