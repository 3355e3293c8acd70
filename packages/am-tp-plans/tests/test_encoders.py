"""Encoder-decoders, encoders with a head and image classifiers over two ranks, on their natural inputs.

A few types, one of each mechanism, run always. With `AM_SWEEP=folder` every type of every task does, under sdpa and
eager attention, and leaves there what it measured; `nox -s sweep` makes `docs/coverage/encoders.md` of it.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.heads import TASKS, inputs_for, small_for, types_for
from am_tp_plans import add_sequence_parallelism, apply_plan, explain_plan, resolve_plan

# The type, and whether its sequence is sharded as well: between the layers of how many stacks.
CASES = {
    ("translation", "bart"): 2,  # keys and values of the decoder come from the encoder
    ("translation", "t5"): 0,  # the first layer makes the biases of all
    ("speech", "whisper"): 2,  # a spectrogram goes in
    ("masked", "distilbert"): 1,
    ("sequence", "bart"): 2,  # the ids of the decoder are made from those of the encoder
    ("token", "deberta-v2"): 1,
    ("question", "electra"): 1,
    ("image", "vit"): 0,  # patches and one token more do not divide
    ("encoding", "bert"): 1,
}
SWEEP = os.environ.get("AM_SWEEP")
EVERY = [(task, name) for task in TASKS for name in types_for(task)] if SWEEP else list(CASES)
# transformers computes softmax and some norms in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@pytest.mark.parametrize(("task", "model_type"), EVERY)
@pytest.mark.ranks(2, timeout=480)
def test_every_stack_is_exact_or_refused(task, model_type):
    dtype = runs_in(task, model_type)
    if dtype is None:
        assert (task, model_type) not in CASES
        record(task, model_type, not_built=True)
        return
    attentions = ("sdpa", "eager") if SWEEP else (None,)
    measured = {"dtype": str(dtype).removeprefix("torch.")}
    for attention in attentions:
        found = measure(task, model_type, attention, dtype)
        for name in ("error", "sequence"):
            if name in measured and name in found:
                found[name] = max(found[name], measured[name])
        measured |= found
        if "refused" in found:
            break
    record(task, model_type, **measured)
    assert SWEEP or "refused" not in measured, measured
    assert SWEEP or measured.get("stacks", 0) == CASES[task, model_type], measured


def runs_in(task, model_type):
    """The widest dtype that the model itself runs in, None if it cannot be had small."""
    for dtype in (torch.float64, torch.float32):
        try:
            model = small_for(task, model_type, dtype)
            with torch.no_grad():
                model(**inputs_for(model, task, 2))
            return dtype
        except Exception:  # whatever a class says to small sizes or to the other dtype
            continue
    return None


def measure(task, model_type, attention, dtype):
    """The largest errors of loss and gradients of a type under one attention, or why it is refused."""
    settings = {"dtype": dtype, "attention": implementation(task, model_type, attention)}
    model = small_for(task, model_type, **settings)
    inputs = inputs_for(model, task, 2)
    batch = inputs_for(model, task, 2, seed=1)
    batch |= labels_for(task, model, batch)
    measured = {"kind": type(model).__name__}
    expected = loss_of(small_for(task, model_type, **settings), batch)
    plan, why = made_once(lambda: resolve_plan(model, infer=True, example_inputs=inputs))
    if plan is None:
        return measured | {"refused": why}
    measured["error"] = compare(small_for(task, model_type, **settings), plan, batch, expected, dtype)
    plan, why = made_once(lambda: add_sequence_parallelism(model, plan, example_inputs=inputs))
    if plan is None:
        return measured | {"sequence_refused": why}
    measured["stacks"] = sum("SequenceGatherOutput" in str(style_names(style)) for style in plan.values())
    measured["whole"] = explain_plan(model, plan, 2, example_inputs=inputs).whole_sequence
    measured["sequence"] = compare(small_for(task, model_type, **settings), plan, batch, expected, dtype)
    return measured


def implementation(task, model_type, attention):
    """The attention if the type has it, else what transformers takes by itself."""
    try:
        small_for(task, model_type, attention=attention)
    except (ValueError, ImportError):
        return None
    return attention


def made_once(make):
    """What the first rank makes, or its reason to refuse: both ranks would plan the same, without a collective."""
    made = [None, None]
    if dist.get_rank() == 0:
        try:
            made = [make(), None]
        except ValueError as error:
            made = [None, str(error)]
    dist.broadcast_object_list(made)
    return made


def style_names(style):
    return [type(part).__name__ for part in getattr(style, "styles", (style,))]


def labels_for(task, model, batch):
    """Labels as the task wants them, of which some do not count where they are of tokens."""
    random = torch.Generator().manual_seed(2)
    first = next(iter(batch.values()))
    tokens = batch.get("decoder_input_ids", first).shape[:2]
    if task in ("translation", "speech", "masked", "token"):
        labels = torch.randint(0, 3 if task == "token" else 57, tokens, generator=random)
        labels[0, : tokens[1] // 2] = -100
        return {"labels": labels}
    if task in ("sequence", "image"):
        return {"labels": torch.randint(0, 3, (len(first),), generator=random)}
    if task == "question":
        return dict(zip(("start_positions", "end_positions"), torch.randint(1, 9, (2, len(first))), strict=True))
    return {}


def loss_of(model, batch):
    """The loss, or of a model without one a number made of all that it returns; and every gradient."""
    torch.manual_seed(0)
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = (whole(output[0]).sin() * torch.linspace(0, 1, output[0].shape[-1], dtype=output[0].dtype)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    return whole(loss).detach(), {n: g if g is None else whole(g) for n, g in gradients.items()}


def compare(sharded, plan, batch, expected, dtype):
    """The largest error of the loss and of any gradient on any rank."""
    apply_plan(sharded, init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
    (wanted, gradients), (loss, mine) = expected, loss_of(sharded, batch)
    largest = max(grad.abs().max().item() for grad in gradients.values() if grad is not None)
    errors = {"loss": relative_error(loss, wanted, 1e-12)}
    for name, grad in gradients.items():
        other = mine[name]
        if grad is None or other is None:
            present = [g for g in (grad, other) if g is not None and g.abs().max() > 0]
            assert not present, f"{name} has a gradient here or in one process, but not in both"
        else:
            errors[name] = relative_error(other, grad, 1e-6 * largest)
    worst = max(errors, key=errors.get)
    most = torch.tensor(errors[worst], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert most.item() < TOLERANCE[dtype], f"off by {most.item():.1e}; here {worst} by {errors[worst]:.1e}"
    return most.item()


def record(task, model_type, **measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"encoders-{task}-{model_type}.json").write_text(json.dumps(measured))
