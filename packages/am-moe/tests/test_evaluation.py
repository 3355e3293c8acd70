"""Forwards without a backward leave a model with experts the parameters that its optimizer holds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from am_moe import build_meshes, parallelize_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

LAYOUTS = {
    "dense, data 2": ("qwen3", {"dp_shard": 2}, {}),
    "dense, a root for each child": ("qwen3", {"dp_shard": 2}, {"wrap_outer_model": False}),
    "experts, ep 2": ("qwen3_moe", {"dp_shard": 2, "ep": 2}, {"activation_checkpointing": True}),
    "experts, two copies": ("qwen3_moe", {"dp_shard": 2}, {"reshard_after_forward": True}),
}


def loss_of(model, seed, share=slice(None)):
    ids, labels = token_batch(4, 8, seed=seed)
    return next_token_loss(model(input_ids=ids[share], use_cache=False).logits, labels[share])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.ranks(2)
def test_evaluations_between_the_parts_of_a_step_change_nothing(layout, mode):
    family, degrees, settings = LAYOUTS[layout]
    model = tiny(family, layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), **degrees)
    names = {"ep_axis_name": "ep", "ep_shard_axis_names": ("ep_shard",)} if "ep" in degrees else {}
    parallelize_model(model, world, moe, dp_axis_names=("dp_shard",), **names, **settings)

    def evaluate():
        with mode():
            loss_of(model, seed=9)
        assert all(isinstance(p, DTensor) for p in model.parameters())

    evaluate()
    held = list(model.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, one)]
    rank = dist.get_rank()
    for step in range(2):
        loss_of(model, step, slice(2 * rank, 2 * rank + 2)).backward()
        loss_of(one, step).backward()
        evaluate()
        assert_same(gradients(model), gradients(one), 1e-10, f"gradients of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        evaluate()
    assert all(mine is before for mine, before in zip(model.parameters(), held, strict=True))
    assert_same(dict(model.named_parameters()), dict(one.named_parameters()), 1e-9, "weights")


@pytest.mark.ranks(2)
def test_what_a_forward_with_a_graph_left_gathered_is_not_used_stale_and_not_edited():
    model = tiny("qwen3", layers=2)
    one = copy.deepcopy(model)
    world, moe = build_meshes(device_type(), dp_shard=2)
    parallelize_model(model, world, moe, dp_axis_names=("dp_shard",))
    with pytest.raises(RuntimeError, match=r"call am_fsdp.save_hf_weights\(model, folder\)"):
        model.save_pretrained("anywhere")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, one)]
    for each in (model, one):
        loss_of(each, 0).backward()
    loss_of(model, 9)
    for optimizer in optimizers:
        optimizer.step()
    loss = loss_of(model, 1)
    assert_same(loss, loss_of(one, 1), 1e-10, "loss after the step")
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"weight of the unit .*: requires_grad was set to False while it was gathered"
    ):
        loss_of(model, 1)
