"""Loads are counted once per token, whatever is recomputed, and balance moves the biases the right way."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from am_moe import ExpertLoad, apply_ac, apply_ep, apply_fsdp
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import OLDEST, small


def experts_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("ep",))


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.ranks(2)
def test_every_choice_is_counted_once_over_all_ranks(recompute):
    model = tiny("qwen3_moe")
    one = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",))
    apply_ep(model, experts_mesh())
    if recompute is not None:
        apply_ac(model, ignore_router=recompute)
    apply_fsdp(model, mesh, True, False)
    loads = [ExpertLoad(m) for m in (model, one)]
    ids, labels = token_batch(4, 6)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    next_token_loss(model(ids[share], use_cache=False).logits, labels[share]).backward()
    one(ids, use_cache=False)
    total, expected = loads[0].total(mesh), loads[1].total()
    assert set(total) == {f"model.layers.{i}.mlp.experts" for i in range(4)}
    for name, counts in total.items():
        assert counts.sum().item() == 4 * 6 * 2
        assert torch.equal(counts, expected[name])
    logged = loads[0].metrics(mesh)
    assert logged["dropped"] == 0
    worst = max((c.max() / c.double().mean()).item() for c in expected.values())
    assert logged["load_max"] == pytest.approx(worst)
    by_rank = max((c.view(2, 4).sum(-1).max() / 24).item() for c in expected.values())
    assert logged["load_rank_max"] == pytest.approx(by_rank)
    loads[0].reset()
    assert sum(c.sum().item() for c in loads[0].total(mesh).values()) == 0
    loads[0].remove()
    model(ids[share], use_cache=False)
    assert sum(c.sum().item() for c in loads[0].total(mesh).values()) == 0


@pytest.mark.parametrize("model_type", ["jetmoe", "llama4_text", "gpt_oss", "dbrx"])
@pytest.mark.ranks(2)
def test_experts_that_are_called_otherwise_are_counted_alike(model_type):
    if OLDEST and model_type == "dbrx":
        pytest.skip("this transformers refuses the sizes in DbrxConfig")
    model = small(model_type, layers=2)
    apply_ep(model, experts_mesh())
    load = ExpertLoad(model)
    model(input_ids=torch.randint(3, 60, (2, 8)), use_cache=False)
    choices = {"jetmoe": 2, "llama4_text": 1, "gpt_oss": 2, "dbrx": 1}[model_type]
    for name, counts in load.chosen.items():
        assert counts.sum().item() == 16 * choices, name
    assert load.metrics(init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",)))["dropped"] == 0


@pytest.mark.ranks(2)
def test_balancing_moves_choices_to_experts_with_less_load():
    model = small("deepseek_v3", first_k_dense_replace=0, layers=1)
    (block,) = [m for m in model.modules() if hasattr(m, "experts")]
    block.gate.e_score_correction_bias[0] = 10.0  # every token chooses the first expert
    load = ExpertLoad(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",))
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    history = []
    for _ in range(40):
        load.reset()
        model(input_ids=ids, use_cache=False)
        history.append(load.metrics(mesh)["load_max"])
        load.balance(mesh, rate=0.5)
    assert history[0] == 2.0, "half of all choices, of four experts"
    assert min(history[-3:]) < 1.7
    biases = [torch.empty_like(block.gate.e_score_correction_bias) for _ in range(2)]
    dist.all_gather(biases, block.gate.e_score_correction_bias)
    assert torch.equal(*biases)


@pytest.mark.parametrize("after", ["backward", "a forward alone"])
@pytest.mark.parametrize("model_type", ["ernie4_5_moe", "afmoe", "laguna", "deepseek_v3"])
@pytest.mark.ranks(2)
def test_balancing_moves_biases_that_are_parameters_as_it_does_in_one_process(model_type, after):
    model = small(model_type, layers=2, **({"first_k_dense_replace": 0} if model_type == "deepseek_v3" else {}))
    one = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",))
    apply_ep(model, experts_mesh())
    apply_fsdp(model, mesh, True, False)
    loads = [ExpertLoad(m) for m in (model, one)]
    ids, labels = token_batch(4, 6, vocab_size=60)
    share = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    logits = model(input_ids=ids[share], use_cache=False).logits
    if after == "backward":
        next_token_loss(logits, labels[share]).backward()
    one(input_ids=ids, use_cache=False)
    loads[0].balance(mesh, rate=0.5)
    loads[1].balance(rate=0.5)
    model(input_ids=ids[share], use_cache=False)  # what was gathered before is not used again
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    names = [n for n, _ in [*one.named_parameters(), *one.named_buffers()] if n.endswith("bias") and "expert" in n]
    names += [n for n, _ in [*one.named_parameters(), *one.named_buffers()] if n.endswith("correction_bias")]
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (model, one)]
    assert names
    for name in names:
        assert_same(tensors[0][name], tensors[1][name], 1e-12, name)
    assert any(tensors[1][name].abs().max() > 0.4 for name in names)


def test_models_without_experts_or_biases_are_refused():
    with pytest.raises(ValueError, match="Linear has no experts whose load"):
        ExpertLoad(nn.Linear(2, 2))
    load = ExpertLoad(tiny("qwen3_moe", layers=1))
    with pytest.raises(ValueError, match="no router of Qwen3MoeForCausalLM has a correction bias"):
        load.balance()
