"""Adapters over 4-bit linears train under FSDP2 as on one process; what would destroy packed bits is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from am_fsdp import fsdp2_strategy_parallelize, load_hf_weights, save_hf_weights
from am_testkit.exact import assert_same
from am_testkit.models import next_token_loss, tiny, token_batch

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
PLAIN = MixedPrecisionPolicy()


def quantised(storage, kind=bnb.nn.Linear4bit):
    """A tiny llama whose layers' linears are packed, with adapters; made as transformers makes it."""
    model = tiny("llama", layers=2, dtype=torch.float32)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        settings = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4", "quant_storage": storage}
        packed = kind(linear.in_features, linear.out_features, **settings)
        packed.load_state_dict(linear.state_dict())
        model.set_submodule(name, packed.to("cpu"))
    model.requires_grad_(False)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


def mesh():
    return init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


@pytest.mark.parametrize(
    ("storage", "recompute"), [(torch.uint8, False), (torch.bfloat16, True), (torch.float32, "mlp")]
)
@pytest.mark.ranks(2)
def test_adapters_over_packed_weights_train_as_on_one_process(storage, recompute, tmp_path):
    one = quantised(storage)
    model = fsdp2_strategy_parallelize(copy.deepcopy(one), mesh(), mp_policy=PLAIN, activation_checkpointing=recompute)
    held = [p for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) for p in m.parameters(recurse=False)]
    assert len(held) == 14
    assert all(2 * p.to_local().numel() == p.numel() for p in held), "each rank has half of the bits"
    ids, labels = token_batch(4, 12)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for _ in range(2):
        next_token_loss(one(ids, use_cache=False).logits, labels).backward()
        next_token_loss(model(ids[mine], use_cache=False).logits, labels[mine]).backward()
        assert gradients(one).keys() == gradients(model).keys()
        assert_same(gradients(model), gradients(one), 1e-5, "gradients of the adapters")
        for each in (one, model):
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1).step()
            each.zero_grad()
    with pytest.raises(ValueError, match=r"q_proj.*weight is packed.*adapters=\"adapter\""):
        save_hf_weights(model, tmp_path / "base", adapters="base")


@pytest.mark.parametrize(
    ("storage", "param_dtype"),
    [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)],
)
@pytest.mark.ranks(2)
def test_a_policy_that_would_cast_packed_bits_is_refused(storage, param_dtype):
    model = quantised(storage)
    with pytest.raises(ValueError, match=rf"packed into {storage}.*cast to {param_dtype}; .*bnb_4bit_quant_storage"):
        fsdp2_strategy_parallelize(model, mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
    assert not any(hasattr(p, "to_local") for p in model.parameters())


@pytest.mark.ranks(1)
def test_weights_that_a_plain_parameter_cannot_stand_for_are_refused(tmp_path):
    one = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    for kind, words in ((bnb.nn.Linear4bit, "Params4bit"), (bnb.nn.Linear8bitLt, "Int8Params")):
        with torch.device("meta"):
            model = nn.ModuleDict({"layers": nn.ModuleList([kind(4, 4)])})
        for refusing in (lambda m: fsdp2_strategy_parallelize(m, one), lambda m: load_hf_weights(m, tmp_path)):
            with pytest.raises(ValueError, match=rf"layers.0.weight is a {words}, which holds more than numbers"):
                refusing(model)
