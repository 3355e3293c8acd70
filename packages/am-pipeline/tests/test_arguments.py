"""What `pipeline_model` takes and what it refuses, with the remedy, before anything is cut or sent."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from am_pipeline import PipelineSchedule, pipeline_model, set_sequence_shards
from am_testkit.device import device_type
from am_testkit.models import next_token_loss, tiny, token_batch


def build(model, **settings):
    mesh = init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    return pipeline_model(model, mesh, microbatch_size=1, local_batch_size=4, loss_fn=next_token_loss, **settings)


@pytest.mark.ranks(2)
def test_models_and_parts_that_something_else_has_wrapped_are_refused():
    alone = init_device_mesh(device_type(), (2, 1), mesh_dim_names=("pp", "dp"))["dp"]
    with pytest.raises(ValueError, match=r"it is wrapped in DistributedDataParallel.*fully_shard"):
        build(DistributedDataParallel(tiny("llama"), process_group=alone.get_group()))
    inner = tiny("llama")
    inner.model = DistributedDataParallel(inner.model, process_group=alone.get_group())
    with pytest.raises(ValueError, match="its module model is wrapped in DistributedDataParallel"):
        build(inner)
    with pytest.raises(ValueError, match=r"it is sharded by FSDP2 already.*parallelize_fn"):
        build(fully_shard(tiny("llama"), mesh=alone))
    layer = tiny("llama")
    fully_shard(layer.model.layers[1], mesh=alone)
    with pytest.raises(ValueError, match=r"its module model\.layers\.1 is sharded by FSDP2"):
        build(layer, pipeline_parallel_schedule="Interleaved1F1B")

    def wrap(part, *meshes, **axes):
        return DistributedDataParallel(part, process_group=alone.get_group())

    class Wrapped(torch.nn.Module):
        def __init__(self, part):
            super().__init__()
            self.inner = part

    for known in ({}, {"seq_len": 12}):  # shapes that are computed at once
        with pytest.raises(ValueError, match=r"the part of stage \d is wrapped in DistributedDataParallel.* use FSDP2"):
            build(tiny("llama"), parallelize_fn=wrap, **known)
        with pytest.raises(ValueError, match=r"is now a Wrapped without the module 'model.layers'.*keep the names"):
            build(tiny("llama"), parallelize_fn=lambda part, *_, **__: Wrapped(part), **known)
        with pytest.raises(TypeError, match="parallelize_fn returned True for stage"):
            build(tiny("llama"), parallelize_fn=lambda *_, **__: True, **known)


@pytest.mark.ranks(2)
def test_a_parallelize_fn_takes_the_meshes_by_position_or_by_name():
    seen = []

    def by_position(part, world, experts, **axes):
        seen.append((world.mesh_dim_names, experts, axes["dp_axis_names"]))

    def by_name(model, *, world_mesh, moe_mesh, dp_axis_names, **axes):
        seen.append((world_mesh.mesh_dim_names, moe_mesh, dp_axis_names))

    class Callable:
        def __call__(self, model, world_mesh, moe_mesh, **axes):
            by_name(model, world_mesh=world_mesh, moe_mesh=moe_mesh, **axes)

    for function in (
        by_position,
        by_name,
        Callable(),
        functools.partial(by_position),
        lambda *a, **k: by_position(*a, **k),
    ):
        build(tiny("llama"), parallelize_fn=function)
    assert seen == [(("pp",), None, ())] * 5
    with pytest.raises(TypeError, match=r"f\(model, world_mesh, moe_mesh, \*, dp_axis_names.*add \*\*axes"):
        build(tiny("llama"), parallelize_fn=lambda part, world, experts, dp_axis_names: None)


@pytest.mark.ranks(2)
def test_what_users_read_has_a_type():
    schedule: PipelineSchedule
    schedule, parts, first, last, stages = build(tiny("llama"))
    assert isinstance(schedule, PipelineSchedule)
    assert stages[0].device == torch.device(device_type())
    ids, labels = token_batch(4, 12)
    schedule.step(*((ids,) if first else ()), target=labels if last else None)
    assert schedule.target_tokens == schedule.pipeline_tokens == 48
    set_sequence_shards(parts[0], 5)
    with pytest.raises(ValueError, match="seq_len=12 does not divide over the 5 ranks"):
        schedule.step(*((ids,) if first else ()), target=labels if last else None)
    with pytest.raises(ValueError, match="ranks must be positive"):
        set_sequence_shards(parts[0], 0)
