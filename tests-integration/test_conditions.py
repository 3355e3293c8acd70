"""What a layout trains is what one process trains, under the conditions of real runs.

Crossed from the axes of `am_testkit.conditions`, conditions and degrees alike. What most runs have is crossed always;
with `AM_SWEEP=folder` all that is legal, and leaves there what it measured. The models are laid out by the code of
`docs/examples`, which is what users start from.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.models.qwen2_moe.modeling_qwen2_moe  # noqa: F401
from torch.distributed.fsdp import MixedPrecisionPolicy

import am_fsdp
from am_testkit import compositions, conditions
from am_testkit.batches import Batch
from am_testkit.compared import compare, compare_gradients, largest_anywhere, mean_over_world
from am_testkit.conditioned import MeanOfAll, autocast, build_model, output_of, tolerance
from am_testkit.device import device_type
from am_testkit.programs import LARGEST_NORM, Loop, OneProcess, zeros_of_a_copy

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

from training.degrees import Degrees
from training.layout import lay_out

SWEEP = os.environ.get("AM_SWEEP")
USUAL = {
    "attention": ("sdpa", "eager"),
    "numbers": ("float32", "float64", "float32 under autocast to bfloat16"),
    "calls": ("three steps", "eval between", "another length", "error survived"),
    "labels": ("uneven", "all"),
    "batch": ("right padding", "positions of one row", "as long as wide"),
    "weights": ("untied", "tied"),
    "pp": (1, 2),
    "dp_shard": (1, 2),
    "tp": (1, 2),
}
CASES = conditions.cross(least=2) if SWEEP else conditions.cross(USUAL, least=2, most=4)
RECOMPUTE = {"none": False, "layers": "full", "every second layer": 2}


def case_of(case):
    marks = pytest.mark.ranks(compositions.ranks(case), timeout=120 if SWEEP else 60)
    return pytest.param(case, id=conditions.name(case), marks=marks)


@pytest.mark.parametrize("case", [case_of(c) for c in CASES if not conditions.must_be_refused(c)])
def test_a_layout_trains_like_one_process_under_every_condition(case):
    try:
        errors = compare(case, InLayout(case, build_model(case)))
    except (ValueError, TypeError, NotImplementedError) as refusal:
        if not SWEEP:
            raise
        record(case, refused=str(refusal))
        return
    worst = largest_anywhere(max(errors.values()))
    record(case, error=worst)
    bad = {what: f"{error:.1e}" for what, error in errors.items() if not error <= tolerance(case)}
    assert worst <= tolerance(case), f"off by {worst:.1e}, here by {bad}"


@pytest.mark.ranks(2)
def test_autocast_around_a_whole_step_holds_with_fsdp2_in_the_stages():
    """torch's cache of cast weights does not see that FSDP2 gathers them anew for each microbatch."""
    case = conditions.PLAIN | {"numbers": "float32 under autocast to bfloat16", "pp": 2}
    one = OneProcess(case, build_model(case))
    loop = InLayout(case, build_model(case), mp_policy=MixedPrecisionPolicy(), autocast=None)
    with torch.autocast(device_type(), torch.bfloat16):
        loop.say("step")
    one.say("step")
    worst = largest_anywhere(max(compare_gradients(loop, one).values()))
    assert worst <= tolerance(case), f"off by {worst:.1e}"


@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "DualPipeV"])
@pytest.mark.ranks(2)
def test_a_schedule_with_two_stages_on_a_rank_evaluates_between_steps(schedule):
    case = conditions.PLAIN | {"pp": 2, "calls": "eval between", "batch": "right padding", "labels": "uneven"}
    worst = largest_anywhere(max(compare(case, InLayout(case, build_model(case), schedule=schedule)).values()))
    assert worst <= tolerance(case), f"off by {worst:.1e}"


SEEDS = [{"weights": "other seeds", "pp": 2}, {"weights": "other seeds", "dp_replicate": 2}]


@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: compositions.name(conditions.PLAIN | seeds))
@pytest.mark.ranks(2)
def test_ranks_that_started_from_other_seeds_are_refused(seeds):
    case = conditions.PLAIN | seeds
    assert conditions.must_be_refused(case)
    with pytest.raises(ValueError, match=r"seed|differ"):
        InLayout(case, build_model(case, seed=dist.get_rank())).say("step")


class InLayout(Loop):
    """The loop of one rank of a layout."""

    def __init__(self, case, model, **instead):
        degrees = degrees_of(case)
        meshes = degrees.meshes(device_type())
        microbatch = conditions.microbatch(case)
        local_batch = conditions.SEQUENCES // degrees.dp
        loss_fn = MeanOfAll(case, local_batch // microbatch * degrees.dp * degrees.cp)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        settings = {
            "schedule": "1F1B",
            "mp_policy": policy if case["numbers"] == "bfloat16 by mp_policy" else None,
            "autocast": autocast(case),
            "recompute": RECOMPUTE.get(case["recompute"], case["recompute"]),
            "output_of": functools.partial(output_of, head=case["head"]),
        }
        self.layout = lay_out(
            model,
            degrees,
            meshes,
            microbatch=microbatch,
            local_batch=local_batch,
            device=torch.device(device_type()),
            loss_fn=loss_fn,
            **settings | instead,
        )
        super().__init__(case, self.layout.parts, loss_fn)
        self.rows, self.stages = degrees.rows(meshes[0], conditions.SEQUENCES), degrees.pp
        if case["compile"] == "layers":
            compile_layers(self.parts)

    def train(self, batch: Batch):
        return self.call(self.layout.step, batch)

    def evaluate(self, batch: Batch):
        return self.call(self.layout.evaluate, batch)

    def clip(self):
        named = [named for part in self.parts for named in part.named_parameters()]
        return am_fsdp.clip_grad_norm_(
            named, LARGEST_NORM, pipeline_shards=self.stages, duplicates=self.layout.duplicates
        )

    def copy(self):
        batch = self.next()
        return sum(zeros_of_a_copy(part, self.case, None if self.stages > 1 else batch) for part in self.parts)

    def call(self, do, batch):
        mine = batch.rows(self.rows)
        return mean_over_world(do(mine.ids, mine.labels, **mine.inputs))


def compile_layers(parts):
    for part in parts:
        for name, module in part.named_modules():
            if name.rpartition(".")[0].endswith(("layers", "layer")) and name.rpartition(".")[2].isdigit():
                module.compile(backend="aot_eager")


def degrees_of(case):
    degrees = {axis: case[axis] for axis in compositions.AXES}
    sequence = degrees["tp"] == "2 sp"
    return Degrees(**degrees | {"tp": 2 if sequence else degrees["tp"]}, sequence_parallel=sequence)


def record(case, **measured):
    if SWEEP and dist.get_rank() == 0:
        path = pathlib.Path(SWEEP, f"conditions-{conditions.name(case)}.json")
        path.write_text(json.dumps({"case": case} | measured))
