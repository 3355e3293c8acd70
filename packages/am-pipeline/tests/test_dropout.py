"""Dropout in a pipeline, shown by its properties: no two runs with it can be compared number by number.

Masks are the same where a layer is computed again, and where a copy must stay a copy; different where the data is.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from am_pipeline import pipeline_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch

DROPPED = {"embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3}


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.ranks(2)
def test_recomputed_layers_drop_the_same(schedule):
    found = []
    for recompute in (False, True):
        step, parts, _ = build(dropping(), schedule, parallelize_fn=recomputed if recompute else None)
        torch.manual_seed(5 + dist.get_rank())
        step(*token_batch(8, 16))
        found.append([gradients(part) for part in parts])
    for kept, again in zip(*found, strict=True):
        assert_same(again, kept, 1e-12)


@pytest.mark.ranks(2)
def test_a_recomputation_that_draws_anew_is_seen():
    """What the test above would show if masks were not kept."""
    forgetful = functools.partial(recomputed, preserve_rng_state=False)
    found = []
    for parallelize in (None, forgetful):
        step, parts, _ = build(dropping(), "1F1B", parallelize_fn=parallelize)
        torch.manual_seed(5 + dist.get_rank())
        step(*token_batch(8, 16))
        found.append(gradients(parts[0]))
    with pytest.raises(AssertionError, match="differ by more than"):
        assert_same(found[1], found[0], 1e-12)


@pytest.mark.ranks(2)
def test_microbatches_and_steps_drop_differently():
    step, parts, _ = build(dropping(), "1F1B")
    drawn = masks_of(parts[0])
    ids, labels = token_batch(2, 16)
    for _ in range(2):
        step(ids.repeat(4, 1), labels.repeat(4, 1))  # every microbatch has the same rows
    assert len(drawn) == 8
    assert all(mask.any() for mask in drawn)
    assert not any(one.equal(other) for place, one in enumerate(drawn) for other in drawn[:place])


@pytest.mark.ranks(4)
def test_replicas_drop_differently_and_agree_on_every_gradient():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "replicas"))
    # Seeds of a run: the same weights everywhere, then one for each rank.
    step, parts, _ = build(dropping(), "1F1B", mesh=mesh, batch=4, parallelize_fn=sharded)
    masks = masks_of(parts[0])
    torch.manual_seed(100 + dist.get_rank())
    ids, labels = token_batch(8, 16)
    mine = slice(4 * mesh.get_local_rank("replicas"), 4 * mesh.get_local_rank("replicas") + 4)
    step(ids[mine], labels[mine])
    replicas = mesh["replicas"].get_group()
    both = [torch.empty_like(masks[0]) for _ in range(2)]
    dist.all_gather(both, masks[0], group=replicas)
    assert not both[0].equal(both[1]), "two data ranks must not drop the same places"
    for name, gradient in gradients(parts[0]).items():
        here = whole(gradient).contiguous()
        copies = [torch.empty_like(here) for _ in range(2)]
        dist.all_gather(copies, here, group=replicas)
        assert copies[0].equal(copies[1]), f"the gradient of {name} differs between replicas"


@pytest.mark.ranks(2)
def test_copies_of_a_tied_weight_stay_bitwise_equal_through_steps_with_dropout():
    model = dropping(tied=True)
    before = copy.deepcopy(model.transformer.wte.weight.detach())
    step, parts, _ = build(model, "1F1B")
    optimizer = torch.optim.AdamW(parts[0].parameters(), lr=1e-2)
    torch.manual_seed(5 + dist.get_rank())
    for number in range(3):
        step(*token_batch(8, 16, seed=number))
        optimizer.step()
        optimizer.zero_grad()
    tied = dict(parts[0].named_parameters(remove_duplicate=False))
    mine = next(tied[name].detach() for name in ("transformer.wte.weight", "lm_head.weight") if name in tied)
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine.contiguous())
    assert both[0].equal(both[1])
    assert not both[0].equal(before)


@pytest.mark.ranks(2)
def test_evaluation_drops_nothing():
    model = dropping()
    one = copy.deepcopy(model).eval()
    _, parts, schedule = build(model, "1F1B")
    ids, labels = token_batch(8, 16)
    for part in parts:
        part.eval()
    first = dist.get_rank() == 0
    logits = schedule.eval(*((ids,) if first else ()), target=None if first else labels)
    if not first:
        with torch.no_grad():
            assert_same(logits, one(ids).logits, 1e-12)


def dropping(tied=False):
    torch.manual_seed(0)
    return tiny("gpt2", tied=tied, **DROPPED).train()


def build(model, schedule_name, *, mesh=None, batch=8, parallelize_fn=None):
    mesh = mesh or init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",))
    schedule, parts, first, last, _ = pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        dp_axis_names=("replicas",) if "replicas" in (mesh.mesh_dim_names or ()) else (),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule_name,
        microbatch_size=2,
        local_batch_size=batch,
        device=torch.device(device_type()),
        loss_fn=next_token_loss,
        parallelize_fn=parallelize_fn,
        scale_grads=True,
    )

    def step(ids, labels):
        schedule.step(*((ids,) if first else ()), target=labels if last else None)

    return step, parts, schedule


def recomputed(part, *_meshes, preserve_rng_state=True, **_axes):
    for layer in part.transformer.h:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


def sharded(part, mesh, _moe_mesh, **_axes):
    for layer in part.transformer.h:
        fully_shard(layer, mesh=mesh["replicas"])
    fully_shard(part, mesh=mesh["replicas"])


def masks_of(part):
    """Where the residual dropout of a part's first layer zeroes, one mask per call."""
    masks: list[torch.Tensor] = []
    first = next(module for name, module in part.named_modules() if name.endswith("resid_dropout"))
    first.register_forward_hook(lambda _module, _inputs, output: masks.append((output == 0).clone()))
    return masks
