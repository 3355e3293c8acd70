"""A recorded step shows every action once, on the rank that did it, and draws as a picture."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import gather_timeline, pipeline_model, plot_timeline, record_timeline
from am_testkit.device import device_type
from am_testkit.models import next_token_loss, tiny, token_batch


@pytest.mark.parametrize(("schedule", "kinds"), [("1F1B", "FB"), ("ZBVZeroBubble", "FIW")])
@pytest.mark.ranks(2)
def test_every_action_of_a_step_is_recorded_once(schedule, kinds):
    built, _, first, last, stages = pipeline_model(
        tiny("llama"),
        init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",)),
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
    )
    ids, labels = token_batch(4, 12)
    call = ((ids,) if first else (), {"target": labels if last else None})
    with record_timeline(stages) as events:
        built.step(*call[0], **call[1])
    everyone = gather_timeline(events, stages)
    forwards = [(e.stage, e.microbatch) for e in everyone if e.kind == "F"]
    assert sorted(forwards) == [(s, m) for s in range(stages[0].num_stages) for m in range(4)]
    assert set(kinds) <= {e.kind for e in everyone}
    assert {e.rank for e in events} == {dist.get_rank()}
    assert all(0 <= e.start <= e.end for e in everyone)
    for before, after in itertools.pairwise(events):
        assert before.end <= after.start, "one rank does one thing at a time"
    recorded = len(events)
    built.step(*call[0], **call[1])
    assert len(events) == recorded, "nothing is recorded after the context is left"


def test_an_empty_timeline_is_refused():
    with pytest.raises(ValueError, match="record a step"):
        plot_timeline([], "nowhere.png")
