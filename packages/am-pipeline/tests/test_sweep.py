"""Every causal language model of transformers through a real pipeline of two and of four stages, against one process.

Every third type runs always. With `AM_SWEEP=folder` all do, and leave there what they measured; `nox -s sweep` makes
`docs/coverage/pipeline.md` of it.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import pipeline_model, plan_cut
from am_testkit.exact import relative_error
from am_testkit.models import next_token_loss
from am_testkit.zoo import NOT_BUILT, logits_of, model_types, runnable, small

# Why a model cannot be cut exactly, in the words of the error.
REFUSED = {
    "big_bird": "between the layers of bert.encoder.layer",
    "blt": "several stacks of the same size",
    "cpmant": "between the layers of cpmant.encoder.layers",
    "glm_moe_dsa": "takes more from the layer before it than the hidden state",
    "hrm_text": "runs the layers in the order",
    "hy_v4": "takes more from the layer before it than the hidden state",
    "inkling2_text": "takes the hidden state of an earlier layer too",
    "mllama": "on text alone its forward runs only the layers",
    "prophetnet": "between the layers of prophetnet.decoder.layers",
    "reformer": "between the layers of reformer.encoder.layers",
    "rwkv": "between the layers of rwkv.blocks",
    "xlm": "changes the hidden state between layer 0 and layer 1",
    "xlnet": "between the layers of transformer.layer",
    "xmod": "between the layers of roberta.encoder.layer",
    "zaya": "takes more from the layer before it than the hidden state",
}
SWEEP = os.environ.get("AM_SWEEP")
TYPES = [name for name in model_types() if name not in NOT_BUILT][:: 1 if SWEEP else 3]
BATCH, LENGTH, MICROBATCH = 4, 16, 2


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=240)
def test_every_decoder_trains_exactly_on_two_and_four_stages_or_is_refused(model_type):
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]) as refusal:
            plan_cut(small(model_type), 4)
        record(model_type, refused=str(refusal.value))
        return
    model, dtype = runnable(model_type)
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    expected = [logits_of(model, chunk) for chunk in ids.chunk(BATCH // MICROBATCH)]
    losses = [next_token_loss(*pair) for pair in zip(expected, labels.chunk(BATCH // MICROBATCH), strict=True)]
    (sum(losses) / len(losses)).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    errors = {}
    for stages, schedule in ((2, "1F1B"), (4, "Interleaved1F1B")):
        model.zero_grad()
        errors[stages], residual = pipelined(model, schedule, ids, labels, torch.cat(expected), wanted)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    record(
        model_type,
        errors=errors,
        dtype=str(dtype).removeprefix("torch."),
        kind=type(model).__name__,
        traveling=[name for name, _ in residual.traveling],
        needs_ids=residual.needs_ids,
    )
    assert max(errors.values()) < tolerance, f"{errors} in {dtype}"


def pipelined(model, schedule_name, ids, labels, expected, wanted):
    """The largest relative error of the logits and of every gradient on this rank; what the cut found."""
    schedule, parts, first, last, stages = pipeline_model(
        model,
        init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)),
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule_name,
        microbatch_size=MICROBATCH,
        local_batch_size=BATCH,
        device=torch.device("cpu"),
        loss_fn=next_token_loss,
        scale_grads=True,
    )
    logits = schedule.step(*((ids,) if first else ()), target=labels if last else None)
    largest = max(grad.abs().max().item() for grad in wanted.values())
    errors = [relative_error(logits, expected, 0.0)] if last else [0.0]
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            missing = parameter.grad is None and name in wanted and wanted[name].abs().max() > 0
            assert not missing, f"{name} has no gradient"
            if parameter.grad is not None:
                target = wanted.get(name, torch.zeros_like(parameter))
                # What is zero but for rounding, such as the gradient of a key bias, is compared with the largest.
                errors.append(relative_error(parameter.grad, target, 1e-6 * largest))
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item(), stages[0].plan.residual


def record(model_type, **measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"pipeline-{model_type}.json").write_text(json.dumps(measured))
