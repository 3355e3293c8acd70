"""Copies of one parameter on two stages stay one parameter, or the step is refused on every rank, by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from am_pipeline import pipeline_model
from am_pipeline.step.shared import _bit_sum
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

NAMES = r"model\.embed_tokens\.weight \(stage 0\) and lm_head\.weight \(stage \d\) are one parameter"


def build(model, mesh=None, schedule="1F1B", **settings):
    return pipeline_model(
        model,
        mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",)),
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=1,
        local_batch_size=4,
        device=torch.device(device_type()),
        loss_fn=next_token_loss,
        scale_grads=True,
        **settings,
    )


def run(built, kind="step"):
    ids, labels = token_batch(4, 12)
    call = getattr(built[0], kind)
    return call(*((ids,) if built[2] else ()), target=labels if built[3] else None)


def tied(built):
    """This rank's copies of the tied weight."""
    found = [p for part in built[1] for n, p in part.named_parameters() if "embed_tokens" in n or "lm_head" in n]
    assert found
    return found


def shard(model, world_mesh, moe_mesh, **axes):
    fully_shard(model, mesh=world_mesh["dp"])


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.ranks(2)
def test_ranks_that_started_from_other_seeds_are_refused(sharded):
    seed = dist.get_rank()
    model = tiny("qwen3", tied=True, seed=seed)
    mesh = init_device_mesh(device_type(), (2, 1), mesh_dim_names=("pp", "dp"))
    built = build(model, mesh, parallelize_fn=shard if sharded else None)
    for kind in ("step", "eval", "step"):
        with pytest.raises(ValueError, match=f"{NAMES}, but hold different values.*set one seed"):
            run(built, kind)
    assert all(p.grad is None for p in built[1][0].parameters())
    with torch.no_grad():
        (weight,) = tied(built)
        (weight.to_local() if sharded else weight).fill_(0.1)
    run(built)


@pytest.mark.ranks(4, timeout=90)
def test_copies_that_optimizers_move_apart_are_refused_with_sharded_parts_too():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    for schedule in ("1F1B", "ZBVZeroBubble"):
        built = build(tiny("qwen3", tied=True), mesh, schedule, parallelize_fn=shard)
        named = [pair for part in built[1] for pair in part.named_parameters()]
        groups = [
            {"params": [p for n, p in named if "embed" in n], "weight_decay": 0.0},
            {"params": [p for n, p in named if "embed" not in n], "weight_decay": 0.1},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
        run(built)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match=f"{NAMES}, but hold different values.*the same optimizer settings"):
            run(built)


@pytest.mark.ranks(2)
def test_a_copy_that_is_frozen_or_trained_alone_is_refused_and_both_together_are_not():
    model = tiny("qwen3", tied=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(4, 12)
    built = build(model)
    run(built)
    for part in built[1]:
        part.zero_grad()
        for name, parameter in part.named_parameters():
            if "embed_tokens" in name:
                parameter.requires_grad_(True)
    words = r"embed_tokens\.weight \(stage 0\) has requires_grad=True and lm_head\.weight \(stage 1\) False"
    with pytest.raises(ValueError, match=f"{NAMES}, but model.{words}; freeze or train both"):
        run(built)
    tied(built)[0].requires_grad_(True)
    whole.requires_grad_(True)
    run(built)
    for i, t in zip(ids.chunk(4), labels.chunk(4), strict=True):
        (next_token_loss(whole(i, use_cache=False).logits, t) / 4).backward()
    assert_same(gradients(built[1][0]), gradients(whole), 1e-10, "gradients after training both")


@pytest.mark.ranks(2)
def test_a_copy_that_was_taken_away_is_missed_on_every_rank():
    built = build(tiny("qwen3", tied=True))
    if built[3]:
        built[1][0].lm_head = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"Identity has no attribute .weight"):
        run(built)


@pytest.mark.ranks(1)
def test_sums_over_bits_tell_tensors_apart_however_they_are_stored():
    mesh = init_device_mesh(device_type(), (1,))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        for shape in ((7, 3), (8, 4), (0, 4), (), (5,)):
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            assert _bit_sum(tensor) == _bit_sum(tensor.clone())
            if tensor.numel() > 1:
                apart = tensor.clone()
                apart.view(torch.uint8).view(-1)[0] += 1
                assert _bit_sum(tensor) != _bit_sum(apart)
                assert _bit_sum(tensor.view(-1)[1:]) == _bit_sum(tensor.clone().view(-1)[1:].clone())
    sharded = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    assert _bit_sum(sharded.to_local()) == _bit_sum(torch.ones(4, 4))
