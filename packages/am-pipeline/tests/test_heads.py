"""Encoder-decoders, and encoders with a head, through a real pipeline of two and of four stages, or refused.

Some types run always; with `AM_SWEEP=folder` all that can be had small do, and leave there what they measured.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import pipeline_model
from am_pipeline.cut.boundary import select_output
from am_pipeline.nested import tensors_in
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.heads import DECODER_TOKENS, TASKS, TOKENS, inputs_for, small_for, types_for
from am_testkit.zoo import model_types

SWEEP = os.environ.get("AM_SWEEP")
ALWAYS = {
    "translation": ["bart", "t5"],
    "speech": ["whisper"],
    "masked": ["modernvbert"],
    "sequence": ["bart"],
    "token": ["bert"],
    "question": ["bert"],
    "image": ["vit"],
    "encoding": ["t5"],
}
TYPES = [
    (task, name)
    for task in TASKS
    for name in (types_for(task) if SWEEP else ALWAYS[task])
    if not SWEEP or task not in ("sequence", "token", "question") or name not in model_types()  # see test_sweep.py
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Their softmax is in float32: the gradient of a key bias is rounding, and another one when the loss is scaled.
LOOSE = {"flaubert": 1e-4, "xlm": 1e-4}
# Attention (None for what transformers takes by itself), schedule over two ranks, and calls.
LAYOUTS = ((None, "Interleaved1F1B", ("step", "eval", "step")), ("eager", "1F1B", ("step",)))
# Why a model is refused, in the words of the error.
REFUSED: dict[str, str] = {}
# Planned without an example of their inputs.
BY_IDS = ("translation", "masked", "token", "question", "encoding")
ROWS, MICROBATCH = 4, 2


@pytest.mark.parametrize(("task", "model_type"), TYPES)
@pytest.mark.ranks(2, timeout=300)
def test_encoders_decoders_and_heads_train_like_one_process_or_are_refused(task, model_type):
    found = {}
    both = SWEEP and task in ("translation", "speech", "masked")
    for attention, schedule, words in LAYOUTS if both else [LAYOUTS[len(model_type) % 2]]:
        model, dtype, why = runnable(task, model_type, attention)
        if model is None:
            record(task, model_type, {"not built": why})
            assert SWEEP, why
            return
        found |= {"kind": type(model).__name__, "dtype": str(dtype).removeprefix("torch.")}
        try:
            found = errors_of(model, task, schedule, words) | found
        except (ValueError, TypeError) as refusal:
            found["refused"] = str(refusal)
            break
    record(task, model_type, found)
    if "refused" in found:
        assert REFUSED.get(f"{task} {model_type}", "not refused") in found["refused"], found
    else:
        largest = max(found[schedule] for _, schedule, _ in LAYOUTS if schedule in found)
        assert largest < LOOSE.get(model_type, TOLERANCE[dtype]), found


def errors_of(model, task, schedule_name, words):
    """By the schedule's name the largest relative error of the last outputs and of all gradients; what travels."""
    batches = [batch_of(model, task, seed) for seed in range(len(words))]
    for word, batch in zip(words, batches, strict=True):
        expected = [whole(model, {name: value[rows] for name, value in batch.items()}) for rows in MICROBATCHES]
        if word == "step":
            sum(mean_square(each) / len(expected) for each in expected).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()
    first_name = next(iter(batches[0]))
    schedule, parts, first, last, stages = pipeline_model(
        model,
        init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",)),
        pipeline_parallel_schedule=schedule_name,
        microbatch_size=MICROBATCH,
        local_batch_size=ROWS,
        loss_fn=lambda output, target: mean_square(output),
        scale_grads=True,
        example_inputs=None if task in BY_IDS else batches[0],
    )
    for word, batch in zip(words, batches, strict=True):
        more = {name: value for name, value in batch.items() if name != first_name}
        call = schedule.step if word == "step" else schedule.eval
        output = call(*((batch[first_name],) if first else ()), target=torch.zeros(ROWS) if last else None, **more)
    errors = []
    if last:
        pieces = zip(*map(tensors_in, expected), strict=True)
        merged = [torch.cat(piece) if piece[0].dim() else torch.stack(piece) for piece in pieces]
        errors = [relative_error(one, two, 0.0) for one, two in zip(tensors_in(output), merged, strict=True)]
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if parameter.grad is not None or (name in wanted and wanted[name].abs().max() > 0):
                assert parameter.grad is not None, f"{name} has no gradient"
                target = wanted.get(name, torch.zeros_like(parameter))
                # What is zero but for rounding, such as the gradient of a key bias, is compared with the largest.
                rounding = 1e-6 if target.dtype is torch.float64 else 1e-3
                errors.append(relative_error(parameter.grad, target, rounding * largest))
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    travels = [str(crossed.value).removeprefix("what ") for crossed in stages[0].plan.traveling]
    return {schedule_name: worst.item(), "travels": travels}


def batch_of(model, task, seed):
    """A batch of a length of its own; all but the first padded on the right where the model takes ids and a mask."""
    return inputs_for(model, task, ROWS, seed, TOKENS - 4 * seed, DECODER_TOKENS - seed, padded=seed > 0)


def whole(model, batch):
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return select_output(model(**batch, **settings))


def mean_square(output):
    """A loss on every tensor that a model returns."""
    tensors = [t.double() for t in tensors_in(output) if t.is_floating_point()]
    return sum((t - torch.linspace(-1, 1, t.shape[-1])).square().mean() for t in tensors if t.dim())


def runnable(task, model_type, attention):
    for dtype in (torch.float64, torch.float32):
        try:
            model = small_for(task, model_type, dtype, attention)
            mean_square(whole(model, inputs_for(model, task, 2))).backward()
            if all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
                model.zero_grad()
                return model, dtype, ""
            why = "its own gradients have NaN"
        except Exception as error:  # in float64; or the model cannot be had small at all
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None, None, why


MICROBATCHES = [slice(start, start + MICROBATCH) for start in range(0, ROWS, MICROBATCH)]


def record(task, model_type, measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"heads-{task}-{model_type}.json").write_text(json.dumps(measured))
