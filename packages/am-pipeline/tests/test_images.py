"""Every vision-language model of transformers through a pipeline of two stages, images in every row, or refused.

Some types run always; with `AM_SWEEP=folder` all do, and leave there what they measured.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import pipeline_model
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.models import next_token_loss
from am_testkit.natural import natural_batch, natural_types, small_with_images

SWEEP = os.environ.get("AM_SWEEP")
ALWAYS = ["gemma3", "idefics3", "internvl", "llava_next", "qwen2_5_vl", "qwen3_vl"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# Why a model is not cut, in the words of the error.
REFUSED = {
    "blip-2": "cannot be cut between the layers of qformer",
}


@pytest.mark.parametrize("model_type", natural_types() if SWEEP else ALWAYS)
@pytest.mark.ranks(2, timeout=240)
def test_images_reach_the_stages_that_need_them_or_are_refused(model_type):
    model, dtype, batches = runnable(model_type)
    record = {"kind": type(model).__name__, "dtype": str(dtype).removeprefix("torch.")}
    labels, expected, wanted = one_process(model, batches)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]) as refusal:
            step(model, batches, labels)
        write(model_type, record | {"refused": str(refusal.value)})
        return
    error = error_of(*step(model, batches, labels), expected, wanted)
    write(model_type, record | {"error": error})
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"


# Features in place of embeddings, which stay on the first stage; features that layers of several stages add.
UNEVEN = [("llava", "1F1B"), ("qwen3_vl", "1F1B"), ("qwen3_vl", "ZBVZeroBubble"), ("qwen3_vl", "Interleaved1F1B")]


@pytest.mark.parametrize(("model_type", "schedule"), UNEVEN)
@pytest.mark.ranks(2, timeout=120)
def test_microbatches_have_two_images_one_and_none(model_type, schedule):
    model, _, _ = runnable(model_type)
    batches = [natural_batch(model, rows=2, seed=seed) for seed in range(4)]
    for images, batch in ((1, batches[1]), (0, batches[2])):
        length = batch["input_ids"].shape[1]
        for name, value in list(batch.items()):
            if value.shape[:2] == (2, length):  # of tokens: rows with images come first
                batch[name] = torch.cat(
                    [value[:images], value[images:] % 50 if name == "input_ids" else value[images:] * 0]
                )
            elif images:
                batch[name] = value[: len(value) // 2 * images]
            else:
                del batch[name]
    batches[2] = {"input_ids": batches[2]["input_ids"]}
    labels, expected, wanted = one_process(model, batches)
    assert error_of(*step(model, batches, labels, schedule), expected, wanted) < TOLERANCE[torch.float64]


# Heights and widths in patches of the images of each row, by step and microbatch.
OF_ANY_SIZE = (
    ([[(4, 4)], [(4, 4)]], [[(4, 4)], [(4, 4)]]),
    ([[(4, 4), (4, 8)], [(8, 4)]], [[(4, 4)], [(4, 4), (4, 4), (4, 12)]]),
    ([[(4, 12)], [(8, 4), (4, 4), (4, 4)]], [[(4, 8)], []]),
    ([[], []], [[(4, 4), (4, 4)], [(4, 4)]]),
)


@pytest.mark.ranks(2, timeout=120)
def test_features_of_images_of_any_number_and_size_travel_to_layers_of_later_stages():
    model = small_with_images("qwen3_vl")
    built = build(model, 2, "1F1B")
    for number, images in enumerate(OF_ANY_SIZE):
        batches = [rows_with(model, of_rows, seed=10 * number + seed) for seed, of_rows in enumerate(images)]
        labels, expected, wanted = one_process(model, batches)
        assert error_of(*call(built, batches, labels), expected, wanted) < TOLERANCE[torch.float64], images
        for part in built[1]:
            part.zero_grad()


def rows_with(model, images, seed, tokens=40):
    """Two rows of text with images of these sizes in them; as Qwen's processor gives them, patches in one tensor."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (2, tokens), generator=generator)
    for row, sizes in enumerate(images):
        at = 1
        for height, width in sizes:
            ids[row, at : at + height * width // 4] = model.config.image_token_id
            at += height * width // 4 + 2
    grid = torch.tensor([(1, *size) for sizes in images for size in sizes])
    batch = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).long()}
    if not len(grid):
        return batch
    patch = natural_batch(model, rows=1)["pixel_values"].shape[1]
    pixels = torch.randn(int(grid.prod(1).sum()), patch, generator=generator, dtype=torch.float64)
    return batch | {"pixel_values": pixels, "image_grid_thw": grid}


@pytest.mark.ranks(2, timeout=120)
def test_rows_of_a_mask_and_of_kinds_of_tokens_go_to_their_microbatches():
    """The model looks up a row of each for each of its sequences, and would find one in the whole batch's too."""
    model = small_with_images("qwen2_5_vl")
    batches = [natural_batch(model, rows=2, seed=seed) for seed in range(2)]
    for place, batch in enumerate(batches):
        padded = torch.nn.functional.pad(batch["input_ids"], (3, 0), value=5)
        batch |= {"input_ids": padded, "attention_mask": torch.ones_like(padded)}
        batch["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (3, 0))
        batch["attention_mask"][place, : 1 + 2 * place] = 0
    labels, expected, wanted = one_process(model, batches)
    together = {n: torch.cat([batch[n] for batch in batches]) for n in ("attention_mask", "mm_token_type_ids")}
    assert error_of(*step(model, batches, labels, **together), expected, wanted) < TOLERANCE[torch.float64]


def error_of(logits, parts, last, expected, wanted):
    """The largest relative error of the logits and of all gradients, on both ranks."""
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    errors = {"logits": relative_error(logits, torch.cat(expected), 0.0)} if last else {}
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if parameter.grad is not None or (name in wanted and wanted[name].abs().max() > 0):
                assert parameter.grad is not None, f"{name} has no gradient"
                target = wanted.get(name, torch.zeros_like(parameter))
                errors[name] = relative_error(parameter.grad, target, 1e-6 * largest)
    total = torch.tensor(max(errors.values()), dtype=torch.float64)
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.item()


def one_process(model, batches):
    """Labels, the logits of every microbatch, and the gradients of their mean loss."""
    labels = [torch.where(b["input_ids"] < 50, b["input_ids"], 3) for b in batches]
    expected = [model(**batch, use_cache=False).logits for batch in batches]
    losses = [next_token_loss(logits, label) for logits, label in zip(expected, labels, strict=True)]
    (sum(losses) / len(losses)).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()
    return labels, expected, wanted


def step(model, batches, labels, kind="1F1B", **together):
    return call(build(model, len(batches), kind), batches, labels, **together)


def build(model, microbatches, kind):
    return pipeline_model(
        model,
        init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",)),
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=kind,
        microbatch_size=2,
        local_batch_size=2 * microbatches,
        device=torch.device(device_type()),
        loss_fn=next_token_loss,
        scale_grads=True,
    )


def call(built, batches, labels, **together):
    schedule, parts, first, last, _ = built
    names = dict.fromkeys(name for batch in batches for name in batch if name != "input_ids")
    further = {name: [batch.get(name) for batch in batches] for name in names} | together
    ids = torch.cat([batch["input_ids"] for batch in batches])
    logits = schedule.step(*((ids,) if first else ()), target=torch.cat(labels) if last else None, **further)
    return logits, parts, last


def runnable(model_type):
    """The model and two microbatches, in float64, or in float32 where its own code mixes the two."""
    for dtype in (torch.float64, torch.float32):
        model = small_with_images(model_type, dtype=dtype)
        try:
            return model, dtype, [natural_batch(model, rows=2, seed=seed) for seed in range(2)]
        except NotImplementedError as error:
            why = error
    raise why


def write(model_type, measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"images-{model_type}.json").write_text(json.dumps(measured))
