"""Folders of models with peft's adapters: base, adapter and merged, bit for bit what peft and transformers read."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import fsdp2_strategy_parallelize, load_hf_weights, save_hf_weights
from am_testkit.device import device_type
from am_testkit.exact import whole
from am_testkit.models import tiny, token_batch

peft = pytest.importorskip("peft")

SHAPES = {"one": (1,), "dp2": (2,), "tp2": (1, 2)}
AXES = ("data_parallel", "tensor_parallel")


def config(**settings):
    return peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]} | settings
    )


def adapted(dtype=torch.float32, **settings):
    """A base model, and one with adapters that have been trained."""
    base = tiny("qwen3", layers=2, dtype=dtype)
    model = peft.get_peft_model(copy.deepcopy(base), config(**settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return base, model


def laid_out(model, shape, dtype=torch.float32):
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=AXES[: len(shape)])
    return fsdp2_strategy_parallelize(model, mesh, dtype)


def shared(path):
    paths = [str(path)]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def equal(model, expected):
    theirs = dict(expected.named_parameters())
    mine = dict(model.named_parameters())
    assert set(mine) == set(theirs)
    for name, parameter in mine.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert whole(parameter).equal(whole(theirs[name])), name


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.ranks(2)
def test_base_adapter_and_merged_model_are_read_back_bit_for_bit(tmp_path, wrapped, dtype):
    base, model = adapted(dtype)
    expected = copy.deepcopy(model)
    laid_out(model if wrapped else model.get_base_model(), (2,), dtype)
    folders = {kind: shared(tmp_path / kind) for kind in ("base", "adapter", "merged")}
    for kind, folder in folders.items():
        save_hf_weights(model if wrapped else model.get_base_model(), folder, adapters=kind, max_shard_size="20KB")
    equal(type(base).from_pretrained(folders["base"]), base)
    equal(peft.PeftModel.from_pretrained(type(base).from_pretrained(folders["base"]), folders["adapter"]), expected)
    equal(type(base).from_pretrained(folders["merged"]), copy.deepcopy(expected).merge_and_unload())


@pytest.mark.ranks(4)
def test_the_adapter_of_a_pipelines_parts_is_one_file(tmp_path):
    base, model = adapted()
    expected = copy.deepcopy(model)
    stage = dist.get_rank() // 2
    part = model.get_base_model()
    part.model.layers[1 - stage] = torch.nn.Identity()
    part.model.embed_tokens = torch.nn.Identity() if stage else part.model.embed_tokens
    part.lm_head = part.lm_head if stage else torch.nn.Identity()
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "data_parallel"))["data_parallel"]
    fsdp2_strategy_parallelize(part, mesh, torch.float32)
    folder = shared(tmp_path / "adapter")
    save_hf_weights(part, folder, adapters="adapter", pipeline_parts=True)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    equal(peft.PeftModel.from_pretrained(base, folder), expected)


@pytest.mark.ranks(2)
def test_a_fused_transposed_layer_is_merged_as_peft_does(tmp_path):
    from am_testkit.zoo import small

    base = small("gpt2", dtype=torch.float32)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    expected = copy.deepcopy(model).merge_and_unload()
    laid_out(model, (2,))
    folder = shared(tmp_path / "merged")
    save_hf_weights(model, folder, adapters="merged")
    equal(type(base).from_pretrained(folder), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "base"])
@pytest.mark.ranks(2)
def test_a_base_folder_is_read_into_a_model_with_adapters_on_meta(tmp_path, wrapped, shape):
    base = tiny("qwen3", layers=2, dtype=torch.float32)
    folder = shared(tmp_path / "base")
    if dist.get_rank() == 0:
        base.save_pretrained(folder, max_shard_size="20KB")
    dist.barrier()
    settings = {"modules_to_save": None} if shape == "tp2" else {}
    with torch.device("meta"):
        model = peft.get_peft_model(tiny("qwen3", layers=2, dtype=torch.float32), config(**settings))
        other = peft.get_peft_model(tiny("qwen3", layers=2, dtype=torch.float32), config(**settings))
    torch.manual_seed(7)
    load_hf_weights(other, folder)  # in no layout
    part = model if wrapped else model.get_base_model()
    if shape != "one":
        if shape == "tp2":
            from am_tp_plans import resolve_plan
            from am_tp_styles import translate_to_lora

            plan = translate_to_lora(resolve_plan(base))
            prefix = "base_model.model." if wrapped else ""
            plan = {prefix + key: style for key, style in plan.items()}
            mesh = init_device_mesh(device_type(), (1, 2), mesh_dim_names=AXES)
            fsdp2_strategy_parallelize(part, mesh, torch.float32, tp_shard_plan=plan)
        else:
            laid_out(part, SHAPES[shape])
    assert load_hf_weights(part, folder) is part
    equal(model, other)
    ids = token_batch(2, 6)[0]
    with torch.no_grad():
        logits, expected = part(ids, use_cache=False).logits, base(ids, use_cache=False).logits
    torch.testing.assert_close(whole(logits), expected, rtol=1e-4, atol=1e-5)
    values = {n: whole(p) for n, p in model.named_parameters() if "lora_" in n}
    assert all((value == 0).all() == ("lora_B" in name) for name, value in values.items())


def test_what_a_folder_of_a_model_with_adapters_holds_must_be_said(tmp_path):
    base, model = adapted()
    with pytest.raises(ValueError, match=r"has adapters .* say what to write: adapters='base', 'adapter' or 'merged'"):
        save_hf_weights(model, tmp_path / "x")
    with pytest.raises(ValueError, match="adapters must be one of"):
        save_hf_weights(model, tmp_path / "x", adapters="all")
    with pytest.raises(ValueError, match="adapters='merged', but Qwen3ForCausalLM has none"):
        save_hf_weights(base, tmp_path / "x", adapters="merged")
    assert not (tmp_path / "x").exists()


def switched_off(model):
    model.base_model.disable_adapter_layers()


def merged_already(model):
    model.merge_adapter()


def two_active(model):
    model.add_adapter("second", config())
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize("change", [switched_off, merged_already, two_active])
def test_adapters_that_are_not_as_they_train_are_refused(tmp_path, change):
    _, model = adapted(modules_to_save=None)
    change(model)
    for kind in ("adapter", "merged", *(["base"] if change is merged_already else [])):
        with pytest.raises(ValueError, match=r"must be active to be saved|merged into the base weights|disabled"):
            save_hf_weights(model, tmp_path / "x", adapters=kind)
    assert not (tmp_path / "x").exists()


def test_adapters_without_a_rule_are_refused_by_name(tmp_path):
    base, model = adapted(use_dora=True)
    for kind in ("adapter", "merged"):
        with pytest.raises(ValueError, match=r"is no (plain LoRA|LoRA matrix)"):
            save_hf_weights(model, tmp_path / "x", adapters=kind)
    save_hf_weights(model, tmp_path / "base", adapters="base")
    equal(type(base).from_pretrained(tmp_path / "base"), base)
    with torch.device("meta"):
        model = peft.get_peft_model(tiny("qwen3", layers=2), config(init_lora_weights="gaussian"))
    with pytest.raises(ValueError, match=r"only LoRA matrices with peft's default init_lora_weights=True"):
        load_hf_weights(model, tmp_path / "base")
    assert all(p.is_meta for p in model.parameters())


def test_a_weight_that_is_tied_is_not_merged(tmp_path):
    model = peft.get_peft_model(
        tiny("qwen3", layers=1, tied=True, dtype=torch.float32), peft.LoraConfig(r=2, target_modules=["lm_head"])
    )
    with pytest.raises(ValueError, match=r"are one weight, and an adapter is on one of them"):
        save_hf_weights(model, tmp_path / "x", adapters="merged")
