"""What data, context and expert ranks train is what one process trains, under the conditions of real runs.

Conditions and layouts of `am_testkit.conditions`, crossed pairwise; with `AM_SWEEP` more of each.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401
from torch.distributed.fsdp import MixedPrecisionPolicy

from am_moe import build_meshes, parallelize_model
from am_moe.context_parallel import shard_sequence
from am_testkit import conditions
from am_testkit.compared import OnRanks, clip_whole_gradients
from am_testkit.conditioned import build_model
from am_testkit.device import device_type
from am_testkit.drawn import assert_trains_like_one_process, draw

USUAL = {
    "attention": ("sdpa", "eager"),
    "numbers": conditions.AXES["numbers"][:4],
    "calls": ("three steps", "eval between", "another length", "forward before clipping", "error survived"),
    "labels": ("all", "uneven", "none on a rank"),
    "batch": ("ids", "right padding", "packed"),
    "trained": ("all", "frozen at first"),
    "weights": ("untied", "tied"),
    "recompute": ("none", "layers"),
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2),
    "cp": (1, 2),
    "ep": (1, 2, 4),
}
CASES = draw(USUAL, narrow=("weights", "recompute", "copies", "compile"))


@pytest.mark.parametrize("case", CASES)
def test_a_layout_trains_like_one_process_under_every_condition(case):
    assert_trains_like_one_process(case, laid_out(case))


def laid_out(case):
    world, experts = build_meshes(
        device_type(), **{axis: case[axis] for axis in ("dp_replicate", "dp_shard", "cp", "ep")}
    )
    model = build_model(case)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallelize_model(
        model,
        world,
        experts,
        dp_axis_names=("dp_replicate", "dp_shard"),
        cp_axis_name="cp",
        ep_axis_name="ep" if case["ep"] > 1 else None,
        ep_shard_axis_names=("ep_shard",),
        activation_checkpointing=case["recompute"] == "layers",
        mp_policy=policy if case["numbers"] == "bfloat16 by mp_policy" else MixedPrecisionPolicy(),
    )
    return OnRanks(case, model, functools.partial(share_of, case, world), clip_whole_gradients, dist.get_world_size())


def share_of(case, world, batch):
    """This rank's rows, and of each its part of the sequence."""
    ranks = conditions.data_ranks(case)
    place = world.get_local_rank("dp_replicate") * case["dp_shard"] + world.get_local_rank("dp_shard")
    mine = batch.rows(slice(place * conditions.SEQUENCES // ranks, (place + 1) * conditions.SEQUENCES // ranks))
    if case["cp"] == 1:
        return mine
    places = torch.arange(mine.ids.shape[1]).expand_as(mine.ids)
    ids, labels = (shard_sequence(tensor, world["cp"]) for tensor in (mine.ids, mine.labels))
    inputs = {
        name: shard_sequence(value, world["cp"]) for name, value in ({"position_ids": places} | mine.inputs).items()
    }
    return replace(mine, ids=ids, labels=labels, inputs=inputs)
