"""A model sharded by its plan trains as one process trains, with sequence parallelism too, under real conditions.

Conditions of `am_testkit.conditions`, crossed pairwise; with `AM_SWEEP` more of each. Every second program starts with
a deep copy, which must compute with its own weights.
"""

from __future__ import annotations

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.compared import OnRanks, clip_whole_gradients
from am_testkit.conditioned import build_model
from am_testkit.device import device_type
from am_testkit.drawn import assert_trains_like_one_process, draw
from am_tp_plans import apply_plan, resolve_plan

USUAL = {
    "attention": ("sdpa", "eager"),
    "numbers": ("float64", "float32", "float32 under autocast to bfloat16", "bfloat16 with norm and head in float32"),
    "calls": ("three steps", "another length", "forward before clipping", "error survived"),
    "labels": ("all", "uneven"),
    "batch": ("ids", "left padding", "packed", "mask of four dims"),
    "head": ("next token", "sequence", "token", "masked"),
    "trained": ("all", "frozen at first", "adapters"),
    "weights": ("untied", "tied"),
    "recompute": ("none", "layers"),
    "tp": (2, "2 sp"),
}
CASES = draw(USUAL, narrow=("numbers", "weights", "recompute", "copies"), copied=True)


@pytest.mark.parametrize("case", CASES)
def test_a_plan_trains_like_one_process_under_every_condition(case):
    assert_trains_like_one_process(case, laid_out(case))


def laid_out(case):
    model = build_model(case)
    if case["recompute"] == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # infer_plan reads linears, which adapters hide
    planned = build_model(case | {"trained": "all"}) if case["head"] == "masked" else model
    plan = resolve_plan(planned, sequence_parallel=case["tp"] == "2 sp", infer=True)
    apply_plan(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
    if case["compile"] == "layers":
        for layer in model.base_model.encoder.layer if case["head"] == "masked" else model.base_model.layers:
            layer.compile(backend="aot_eager")
    return OnRanks(case, model, lambda batch: batch, clip_whole_gradients, 1)
