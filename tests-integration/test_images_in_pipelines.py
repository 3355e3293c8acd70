"""Images on one data rank of a pipeline and none on the other, where am-fsdp shards the parts, like one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import am_fsdp
import am_pipeline
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.models import next_token_loss
from am_testkit.natural import natural_batch, small_with_images


def shard(part, world_mesh, moe_mesh, **axes):
    return am_fsdp.fsdp2_strategy_parallelize(
        part, world_mesh, dp_mesh_name="dp", param_dtype=torch.float64, sequence_parallel=False
    )


@pytest.mark.ranks(4, timeout=240)
def test_a_data_rank_without_images_trains_beside_one_with_images():
    model, whole = small_with_images("llava"), small_with_images("llava")
    batches = [natural_batch(model, rows=2, seed=seed) for seed in range(2)]
    text = [{"input_ids": torch.where(b["input_ids"] < 50, b["input_ids"], 4)} for b in batches]
    labels = torch.cat([torch.where(b["input_ids"] < 50, b["input_ids"], 3) for b in batches])
    for batch, label in zip((*batches, *text), (*labels.chunk(2), *labels.chunk(2)), strict=True):
        (next_token_loss(whole(**batch, use_cache=False).logits, label) / 4).backward()
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    schedule, parts, first, last, _ = am_pipeline.pipeline_model(
        model,
        mesh,
        dp_axis_names=("dp",),
        parallelize_fn=shard,
        microbatch_size=2,
        local_batch_size=4,
        loss_fn=next_token_loss,
        scale_grads=True,
    )
    mine = text if mesh.get_local_rank("dp") else batches
    images = {} if mesh.get_local_rank("dp") else {"pixel_values": [batch["pixel_values"] for batch in batches]}
    ids = torch.cat([batch["input_ids"] for batch in mine])
    schedule.step(*((ids,) if first else ()), target=labels if last else None, **(images if first else {}))
    found = {n: p.grad.full_tensor() for n, p in parts[0].named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    assert_same(found, {name: wanted[name] for name in found}, 1e-9, "gradients")
    assert not first or any("vision_tower" in name for name in found)
