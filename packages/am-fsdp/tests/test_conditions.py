"""What FSDP2 trains, with and without tensor ranks, is what one process trains, under the conditions of real runs.

Conditions and layouts of `am_testkit.conditions`, crossed pairwise; with `AM_SWEEP` more of each.
"""

from __future__ import annotations

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from am_fsdp import clip_grad_norm_, fsdp2_strategy_parallelize
from am_testkit import conditions
from am_testkit.compared import OnRanks
from am_testkit.conditioned import build_model
from am_testkit.device import device_type
from am_testkit.drawn import assert_trains_like_one_process, draw

USUAL = {
    "attention": ("sdpa", "eager"),
    "numbers": conditions.AXES["numbers"][:4],
    "calls": ("three steps", "eval between", "another length", "forward before clipping", "error survived"),
    "labels": ("all", "uneven", "none on a rank"),
    "batch": ("ids", "right padding", "packed"),
    "trained": ("all", "frozen at first", "adapters"),
    "weights": ("untied", "tied"),
    "recompute": ("none", "layers"),
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2),
    "tp": (1, 2, "2 sp"),
}
CASES = draw(USUAL, narrow=("weights", "copies", "compile"))
RECOMPUTE = {"none": False, "layers": "full", "every second layer": 2}
AXES = ("dp_replicate", "dp_shard", "tp")


@pytest.mark.parametrize("case", CASES)
def test_a_layout_trains_like_one_process_under_every_condition(case):
    assert_trains_like_one_process(case, laid_out(case))


def laid_out(case):
    degrees = [int(str(case[axis])[0]) for axis in AXES]
    mesh = init_device_mesh(device_type(), tuple(degrees), mesh_dim_names=AXES)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fsdp2_strategy_parallelize(
        build_model(case),
        mesh,
        mp_policy=policy if case["numbers"] == "bfloat16 by mp_policy" else MixedPrecisionPolicy(),
        sequence_parallel=case["tp"] == "2 sp",
        activation_checkpointing=RECOMPUTE.get(case["recompute"], case["recompute"]),
        dp_mesh_name=AXES[:2] if case["dp_replicate"] > 1 else "dp_shard",
        tp_mesh_name="tp",
    )
    ranks = conditions.data_ranks(case)
    place = mesh.get_local_rank("dp_replicate") * degrees[1] + mesh.get_local_rank("dp_shard")
    rows = slice(place * conditions.SEQUENCES // ranks, (place + 1) * conditions.SEQUENCES // ranks)
    return OnRanks(case, model, lambda batch: batch.rows(rows), clip_grad_norm_, ranks)
