"""A vision tower over stages of its own, before the decoder's: exact, or refused, or whole on the first stage."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_pipeline import build_part, pipeline_model, plan_cut
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error
from am_testkit.models import next_token_loss
from am_testkit.natural import natural_batch, small_with_images

# Features of the layer before the last; patches of all images in one tensor; images that are left out where padded.
LAYOUTS = {"1F1B": ("llava", "idefics3"), "Interleaved1F1B": ("qwen2_5_vl", "llava")}


@pytest.mark.parametrize("schedule", LAYOUTS)
@pytest.mark.ranks(2, timeout=180)
def test_a_tower_cut_over_stages_trains_like_one_process(schedule):
    for model_type in LAYOUTS[schedule]:
        model = small_with_images(model_type)
        batches = batches_of(model)
        expected, wanted = one_process(model, batches)
        built = build(model, schedule, batches[0])
        assert built[4][0].plan.anatomy.depths == (4, 4)
        assert_equals(built, call(built, batches), expected, wanted, model_type)


@pytest.mark.ranks(2, timeout=180)
def test_other_numbers_of_images_change_the_messages_or_are_refused_on_every_rank():
    model = small_with_images("qwen2_5_vl")
    for parameter in model.model.visual.parameters():
        parameter.requires_grad = False
    one, two = batches_of(model)
    built = build(model, "1F1B", one, balance="layers")
    longer = {name: torch.cat([value, value[:, -2:]], 1) for name, value in one.items() if name in OF_TEXT}
    longer |= {name: value for name, value in one.items() if name not in OF_TEXT}
    more = [fewer_images(model, batch) for batch in (one, two)]
    for batches in ([one, two], [longer, longer], more, [one, more[1]]):
        expected, wanted = one_process(model, batches)
        assert_equals(built, call(built, batches, "eval"), expected, {}, "eval")
        assert_equals(built, call(built, batches), expected, wanted, "step")
        for part in built[1]:
            part.zero_grad()
    text = {name: torch.where(one[name] < 50, one[name], 3) for name in ("input_ids",)}
    with pytest.raises(ValueError, match=r"does not run model\.visual\.blocks"):
        call(built, [text, text])
    with pytest.raises(ValueError, match=r"one with images|cannot be called|differ in form"):
        call(built, [one, {**two, "pixel_values": None, "image_grid_thw": None}])
    expected, wanted = one_process(model, [two, one])
    assert_equals(built, call(built, [two, one]), expected, wanted, "after refusals")


def test_features_of_several_layers_of_a_tower_travel_to_the_layers_that_read_them():
    model = small_with_images("qwen3_vl")
    batch = natural_batch(model, rows=2)
    expected, wanted = one_process(model, [batch])
    plan = plan_cut(model, 4, example_inputs=batch, balance="layers")
    assert plan.anatomy.stacks == ("model.visual.blocks", "model.language_model.layers")
    assert "model.visual.deepstack_merger_list.1" in plan.stages[0]
    assert {str(c.shape) for c in plan.passages[3].receives} == {"(1/4 * images, 32)", "(batch, sequence, 32)"}
    assert not plan.shared
    sent = (batch["input_ids"],)
    for stage in range(4):
        output = build_part(model, plan, stage)[0](*sent, **batch if stage else without_ids(batch))
        sent = output if isinstance(output, tuple) else (output,)
    (next_token_loss(output, labels_of(batch)) / 2).backward()
    assert_same(output, expected, 1e-12, "logits")
    assert_same(gradients(model), wanted, 1e-10, "gradients")


def without_ids(batch):
    return {name: value for name, value in batch.items() if name != "input_ids"}


@pytest.mark.ranks(4, timeout=180)
def test_data_ranks_of_which_one_has_no_images_are_refused_before_they_wait():
    model = small_with_images("llava")
    batches = batches_of(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    built = build(model, "1F1B", None, mesh, dp_axis_names=("dp",), parallelize_fn=shard)
    text = [{"input_ids": torch.where(b["input_ids"] < 50, b["input_ids"], 3)} for b in batches]
    with pytest.raises(ValueError, match="the data ranks of a stage run different modules"):
        call(built, text if mesh.get_local_rank("dp") else batches)
    with pytest.raises(ValueError, match="the data ranks of a stage run different modules"):
        call(built, (batches[:1] + text[1:]) if mesh.get_local_rank("dp") else (text[:1] + batches[1:]))
    call(built, batches)
    assert any(p.grad is not None and p.grad.to_local().abs().max() > 0 for p in built[1][0].parameters())


OF_TEXT = ("input_ids", "mm_token_type_ids")


def batches_of(model):
    return [natural_batch(model, rows=2, seed=seed) for seed in range(2)]


def fewer_images(model, batch):
    """Of the second row text alone: one image for two rows."""
    ids = batch["input_ids"].clone()
    ids[1] = torch.where(ids[1] < 50, ids[1], 3)
    kinds = batch["mm_token_type_ids"].clone()
    kinds[1] = 0
    half = {name: batch[name][: len(batch[name]) // 2] for name in ("pixel_values", "image_grid_thw")}
    return {"input_ids": ids, "mm_token_type_ids": kinds, **half}


def labels_of(batch):
    return torch.where(batch["input_ids"] < 50, batch["input_ids"], 3)


def one_process(model, batches):
    """The logits of all batches, and the gradients of their mean loss."""
    model.zero_grad()
    logits = [model(**batch, use_cache=False).logits for batch in batches]
    (sum(next_token_loss(each, labels_of(batch)) for each, batch in zip(logits, batches, strict=True)) / 2).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    model.zero_grad()
    return torch.cat(logits), wanted


def build(model, schedule, example, mesh=None, **settings):
    mesh = mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    given = {"microbatch_size": 2, "local_batch_size": 4, "loss_fn": next_token_loss, "scale_grads": True}
    given |= {"balance": "layers", "example_inputs": example}
    return pipeline_model(model, mesh, pipeline_parallel_schedule=schedule, **given | settings)


def call(built, batches, word="step"):
    schedule, _, first, last, _ = built
    names = dict.fromkeys(name for batch in batches for name in batch if name != "input_ids")
    further = {name: [batch.get(name) for batch in batches] for name in names} if first else {}
    ids = torch.cat([batch["input_ids"] for batch in batches])
    target = torch.cat([labels_of(batch) for batch in batches]) if last else None
    return getattr(schedule, word)(*((ids,) if first else ()), target=target, **further)


def assert_equals(built, logits, expected, wanted, what):
    errors = [relative_error(logits, expected, 0.0)] if built[3] else [0.0]
    largest = max((gradient.abs().max().item() for gradient in wanted.values()), default=0.0)
    for part in built[1]:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            if parameter.grad is not None or (name in wanted and wanted[name].abs().max() > 0):
                assert parameter.grad is not None, f"{name} has no gradient"
                target = wanted.get(name, torch.zeros_like(parameter))
                errors.append(relative_error(parameter.grad, target, 1e-6 * largest))
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert worst.item() < 1e-9, f"{what} is off by {worst.item():.1e}"


def assert_steps_equal(model, built, steps):
    """Steps one after the other, each from no gradients."""
    for number, batches in enumerate(steps):
        expected, wanted = one_process(model, batches)
        assert_equals(built, call(built, batches), expected, wanted, f"step {number}")
        for part in built[1]:
            part.zero_grad()


def shard(part, world_mesh, moe_mesh, **axes):
    for name, module in part.named_modules():
        if name.rpartition(".")[0].endswith(".layers") and any(True for _ in module.parameters()):
            fully_shard(module, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


@pytest.mark.ranks(2, timeout=180)
def test_a_list_of_none_for_every_microbatch_is_text_alone():
    model = small_with_images("llava", layers=2)
    text = [{"input_ids": labels_of(batch)} for batch in batches_of(model)]
    expected, wanted = one_process(model, text)
    built = build(model, "1F1B", None)
    assert_equals(built, call(built, [batch | {"pixel_values": None} for batch in text]), expected, wanted, "text")


@pytest.mark.ranks(2, timeout=180)
def test_a_tower_that_runs_on_images_and_on_videos_stays_whole_though_both_are_shown():
    model = small_with_images("qwen2_5_vl", layers=2)
    batches = [with_video(model, batch) for batch in batches_of(model)]
    expected, wanted = one_process(model, batches)
    built = build(model, "1F1B", batches[0])
    assert built[4][0].plan.anatomy.stacks == ("model.language_model.layers",)
    assert_equals(built, call(built, batches), expected, wanted, "images and videos")


def with_video(model, batch):
    """The image of the second row as a video of one frame."""
    ids, kinds = batch["input_ids"].clone(), batch["mm_token_type_ids"].clone()
    ids[1] = torch.where(ids[1] == model.config.image_token_id, model.config.video_token_id, ids[1])
    kinds[1] *= 2
    pixels, grids = batch["pixel_values"].chunk(2), batch["image_grid_thw"].chunk(2)
    images = {"pixel_values": pixels[0], "image_grid_thw": grids[0]}
    return {"input_ids": ids, "mm_token_type_ids": kinds, **images} | {
        "pixel_values_videos": pixels[1],
        "video_grid_thw": grids[1],
    }


@pytest.mark.ranks(2, timeout=180)
def test_images_of_other_numbers_of_tiles_change_the_messages_from_step_to_step_and_within_one():
    model = small_with_images("llava_next", layers=2, image_grid_pinpoints=[[56, 112], [112, 112], [112, 56]])
    large, small = (tiled(model, size) for size in ([112, 112], [56, 112]))
    built = build(model, "1F1B", large)
    assert_steps_equal(model, built, ([large, large], [small, small], [large, small], [small, large], [large, large]))


def tiled(model, size):
    """Two images of a size, padded to five tiles each, and as many tokens as they have."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 5, 3, 56, 56, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([size, size])
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    ids = torch.randint(3, 50, (2, 60), generator=generator)
    for row, of_row in zip(ids, features, strict=True):
        row[1 : 1 + len(of_row)] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes}


@pytest.mark.ranks(2, timeout=240)
def test_rows_of_other_numbers_of_images_are_exact_in_whatever_order_they_come():
    """Rows with fewer are padded with images of zeros, which the model leaves out."""
    model = small_with_images("idefics3", layers=2)
    full, fewer = (images_in_rows(model, numbers) for numbers in ((2, 2), (2, 1)))
    built = build(model, "1F1B", None)
    assert_steps_equal(model, built, ([fewer, fewer], [full, full], [fewer, full]))


def images_in_rows(model, numbers):
    """Rows with so many images of the two that there is room for, and their tokens."""
    one = natural_batch(model, rows=1)
    tokens = int((one["input_ids"] == model.config.image_token_id).sum())
    generator = torch.Generator().manual_seed(2)
    shape = (len(numbers), 2, *one["pixel_values"].shape[2:])
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(3, 50, (len(numbers), 2 * tokens + 6), generator=generator)
    for row, (images, number) in enumerate(zip(pixels, numbers, strict=True)):
        images[number:] = 0
        ids[row, 1 : 1 + number * tokens] = model.config.image_token_id
    return {"input_ids": ids, "pixel_values": pixels}
