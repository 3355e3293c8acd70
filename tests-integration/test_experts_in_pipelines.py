"""Experts over the data ranks of two pipeline stages, for every mixture of experts that can be cut, like one process.

Some types run always; with `AM_SWEEP=folder` every type does and leaves there what it measured.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist

import am_moe
import am_pipeline
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.models import next_token_loss
from am_testkit.zoo import NOT_BUILT, logits_of, model_types, runnable, small

SWEEP = os.environ.get("AM_SWEEP")
ALWAYS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "nemotron_h"]
TYPES = [t for t in model_types() if t not in NOT_BUILT] if SWEEP else ALWAYS
_GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
SETTINGS = {"dots3_note_text": {"layers": 2}, "gemma4": {"text_config": _GEMMA4}, "gemma4_text": _GEMMA4}
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(4, timeout=240)
def test_experts_in_a_pipeline_train_as_in_one_process(model_type):
    model, dtype = runnable(model_type, **SETTINGS.get(model_type, {}))
    if not am_moe.find_experts(model):
        pytest.skip("has no experts")
    try:
        am_pipeline.plan_cut(small(model_type, **SETTINGS.get(model_type, {})), 2)
    except ValueError as refusal:
        record(model_type, f"refused: {refusal}")
        return
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 60, (8, 16), generator=generator) for _ in range(2))
    logits = logits_of(model, ids)
    next_token_loss(logits, labels).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()
    world, experts = am_moe.build_meshes(device_type(), pp=2, dp_shard=2, ep=2)
    rank = world["dp_shard"].get_local_rank()
    share = slice(4 * rank, 4 * rank + 4)
    schedule, parts, first, last, _ = am_pipeline.pipeline_model(
        model,
        world,
        experts,
        pp_axis_name="pp",
        dp_axis_names=("dp_shard",),
        ep_axis_name="ep",
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule="1F1B",
        microbatch_size=2,
        local_batch_size=4,
        device=torch.device(device_type()),
        loss_fn=next_token_loss,
        parallelize_fn=am_moe.parallelize_model,
        scale_grads=True,
    )
    output = schedule.step(*((ids[share],) if first else ()), target=labels[share] if last else None)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    errors = {"logits": relative_error(output, logits[share], 0.0)} if last else {"": 0.0}
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            gradient = None if parameter.grad is None else whole(parameter.grad)
            assert gradient is not None or name not in wanted or wanted[name].abs().max() == 0, name
            if gradient is not None:
                target = wanted.get(name, torch.zeros_like(gradient))[: len(gradient)]
                errors[name] = relative_error(gradient, target, 1e-6 * largest)
    what = max(errors, key=errors.get)
    worst = torch.tensor(errors[what], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    record(model_type, worst.item())
    tolerance = 1e-3 if model_type.startswith(("deepseek_v4", "gemma4")) else TOLERANCE[dtype]  # float32 parts
    assert worst.item() < tolerance, f"off by {worst.item():.1e} (here {errors[what]:.1e} in {what})"


def record(model_type, result):
    if SWEEP and dist.get_rank() == 0:
        file = pathlib.Path(SWEEP, f"experts-{model_type}.json")
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | {"pp 2 x ep 2": result}))
