"""Encoder-decoders, encoders with a head and models of images over two ranks, on their natural inputs.

A few types, one of each mechanism, run always, with the attention that transformers takes by itself. With
`AM_SWEEP=folder` every type of every task does, some with eager attention, and leaves there what it measured;
`nox -s sweep` makes `docs/coverage/encoders.md` of it.
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
from am_testkit.natural import natural_batch, natural_types, small_with_images
from am_testkit.zoo import model_types
from am_tp_plans import add_sequence_parallelism, apply_plan, explain_plan, resolve_plan

# The type, and whether its sequence is sharded as well: between the layers of how many stacks.
CASES = {
    ("translation", "bart"): 2,  # keys and values of the decoder come from the encoder
    ("translation", "t5"): 2,  # the first layer makes the biases of all, and a layer is a list of what it calls
    ("translation", "m2m_100"): 2,  # the activation is a module of torch
    ("speech", "whisper"): 2,  # a spectrogram goes in
    ("masked", "distilbert"): 1,
    ("sequence", "bart"): 2,  # the ids of the decoder are made from those of the encoder
    ("token", "deberta-v2"): 1,
    ("question", "electra"): 1,
    ("image", "vit"): 0,  # patches and one token more do not divide
    ("encoding", "bert"): 1,
    ("images", "deepseek_vl"): 2,  # transformers' plan is for the text alone
    ("images", "qwen2_vl"): 1,  # patches of all images in one sequence
}
SWEEP = os.environ.get("AM_SWEEP")
# Of heads for sequences, tokens and questions the types that are no causal models, whose stacks are in test_sweep.py.
EVERY = [("images", name) for name in natural_types()] + [
    (task, name)
    for task in TASKS
    for name in types_for(task)
    if task not in ("sequence", "token", "question") or name not in model_types()
]
LARGEST = 30_000_000  # parameters of a model that is small enough to measure
# transformers computes softmax and some norms in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@pytest.mark.parametrize(("task", "model_type"), EVERY if SWEEP else CASES)
@pytest.mark.ranks(2, timeout=300)
def test_every_stack_is_exact_or_refused(task, model_type):
    attention = "eager" if SWEEP and len(model_type) % 2 else None
    dtype = runs_in(task, model_type, attention)
    if dtype is None:
        assert (task, model_type) not in CASES
        record(task, model_type, not_built=True)
        return
    measured = {"dtype": str(dtype).removeprefix("torch."), "attention": attention or ""}
    measured |= measure(task, model_type, attention, dtype)
    record(task, model_type, **measured)
    assert SWEEP or "refused" not in measured, measured
    assert SWEEP or measured.get("stacks", 0) == CASES[task, model_type], measured


def runs_in(task, model_type, attention):
    """The widest dtype that the model itself runs in, None if it cannot be had small."""
    for dtype in (torch.float64, torch.float32):
        try:
            model = made(task, model_type, dtype, attention)
            batch = given(model, task)
            if not loss_of(model, batch | labels_for(task, model, batch))[0].isfinite():
                continue  # CANINE's float64 masks make NaN of its scores
            return dtype if sum(p.numel() for p in model.parameters()) <= LARGEST else None
        except Exception:  # whatever a class says to small sizes or to the other dtype
            continue
    return None


def made(task, model_type, dtype, attention):
    if task == "images":
        return small_with_images(model_type, dtype=dtype, attention=attention)
    return small_for(task, model_type, dtype, attention)


def given(model, task, seed=0):
    """Two rows of natural inputs; of ids with images an even number, of which two ranks have a half each."""
    if task != "images":
        return inputs_for(model, task, 2, seed=seed)
    batch = natural_batch(model, rows=2, seed=seed)
    rows, length = batch["input_ids"].shape
    return {name: x[:, : length - length % 2] if x.shape == (rows, length) else x for name, x in batch.items()}


def measure(task, model_type, attention, dtype):
    """The largest errors of loss and gradients of a type under one attention, or why it is refused."""
    model = made(task, model_type, dtype, attention)
    inputs, batch = given(model, task), given(model, task, seed=1)
    batch |= labels_for(task, model, batch)
    measured = {"kind": type(model).__name__}
    expected = loss_of(made(task, model_type, dtype, attention), batch)
    plan, why = made_once(lambda: resolve_plan(model, infer=True, example_inputs=inputs))
    if plan is None:
        return measured | {"refused": why}
    report = explain_plan(model, plan, 2, example_inputs=inputs)
    measured |= {"held": report.held / report.parameters, "whole_stacks": report.whole_stacks}
    measured["error"] = compare(made(task, model_type, dtype, attention), plan, batch, expected, dtype)
    plan, why = made_once(lambda: add_sequence_parallelism(model, plan, example_inputs=inputs))
    if plan is None:
        return measured | {"sequence_refused": why}
    measured["stacks"] = sum("SequenceGatherOutput" in str(style_names(style)) for style in plan.values())
    measured["whole"] = explain_plan(model, plan, 2, example_inputs=inputs).whole_sequence
    measured["sequence"] = compare(made(task, model_type, dtype, attention), plan, batch, expected, dtype)
    return measured


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
    if task == "images":
        return {"labels": torch.where(batch["input_ids"] < 50, batch["input_ids"], -100)}
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
    gradients = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.numel()}
    return whole(loss).detach(), {n: g if g is None else whole(g) for n, g in gradients.items()}


def compare(sharded, plan, batch, expected, dtype):
    """The largest error of the loss and of any gradient on any rank."""
    apply_plan(sharded, init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
    (wanted, gradients), (loss, mine) = expected, loss_of(sharded, batch)
    largest = max(grad.nan_to_num().abs().max().item() for grad in gradients.values() if grad is not None)
    errors = {"loss": relative_error(loss, wanted, 1e-12)}
    for name, grad in gradients.items():
        other = mine[name]
        if grad is None or other is None:
            present = [g for g in (grad, other) if g is not None and g.abs().max() > 0]
            assert not present, f"{name} has a gradient here or in one process, but not in both"
        else:
            errors[name] = relative_error(other, grad, TOLERANCE[dtype] * largest, nan_is_nan=True)  # LED's own are
    worst = max(errors, key=errors.get)
    most = torch.tensor(errors[worst], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    assert most.item() < TOLERANCE[dtype], f"off by {most.item():.1e}; here {worst} by {errors[worst]:.1e}"
    return most.item()


def record(task, model_type, **measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"encoders-{task}-{model_type}.json").write_text(json.dumps(measured))
