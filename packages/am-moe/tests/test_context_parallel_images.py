"""Images under context parallelism: embeddings are made whole on every rank, then cut; exact, or refused by name.

One of each mechanism runs always; with `AM_SWEEP=folder` every type does, and leaves there what it measured.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_moe import parallelize_model
from am_moe.context_parallel import apply_cp, shard_batch
from am_testkit.device import device_type
from am_testkit.exact import assert_same, relative_error, whole
from am_testkit.natural import natural_batch, natural_types, small_with_images

SWEEP = os.environ.get("AM_SWEEP")
# Positions of the text, of the images (M-RoPE), images in several layers, images whose tokens see each other.
MECHANISMS = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = 1e-5


def small(model_type):
    return small_with_images(model_type, layers=2)


def context_mesh():
    return init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))


def batch_of(model, rows, padded):
    """Images and text of a length that divides, with labels; padding left in the first row and right in the last."""
    batch = natural_batch(model, rows)
    more = -batch["input_ids"].shape[1] % 8
    text = torch.randint(3, 50, (rows, more), generator=torch.Generator().manual_seed(3))
    for name, value in batch.items():
        if name == "input_ids":
            batch[name] = torch.cat([value, text], 1)
        elif name.endswith("token_type_ids"):
            batch[name] = torch.cat([value, torch.zeros_like(text)], 1)
    labels = batch["input_ids"].clone()
    if padded:
        mask = torch.ones_like(labels)
        mask[0, :2] = mask[-1, -3:] = 0
        batch["attention_mask"] = mask
        labels[mask == 0] = -100
    return batch | {"labels": labels}


def check(model, one, mesh, batch):
    """Loss and every gradient against one process."""
    expected = one(**batch).loss
    expected.backward()
    loss = model(**shard_batch(batch, mesh)).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    error = abs(mean.item() / mesh.size() - expected.item()) / abs(expected.item())
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) >= (name in wanted), name
        if name in wanted:
            error = max(error, relative_error(whole(parameter.grad), wanted[name], 1e-6 * largest))
    worst = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    model.zero_grad()
    one.zero_grad()
    return worst.item()


@pytest.mark.parametrize("model_type", natural_types() if SWEEP else MECHANISMS)
@pytest.mark.ranks(2, timeout=120)
def test_images_on_context_ranks_train_as_in_one_process(model_type):
    mesh = context_mesh()
    one = small(model_type)
    try:
        one(**batch_of(one, 2, True))
    except AttributeError as error:  # its own config lacks what its code reads
        record(model_type, f"not run in one process: {error}")
        pytest.skip(str(error))
    model = copy.deepcopy(one)
    try:
        apply_cp(model, mesh)
        fully_shard(model, mesh=mesh)
        errors = [
            check(model, one, mesh, batch_of(one, rows, padded)) for rows, padded in ((2, False), (2, True), (4, False))
        ]
        text = {n: x for n, x in batch_of(one, 2, True).items() if not n.startswith(("pixel", "image", "mm_"))}
        text["input_ids"] = text["input_ids"] % 50
        errors.append(check(model, one, mesh, text))
        found = max(errors)
        assert found < TOLERANCE, f"off by {errors}"
    except ValueError as error:
        if not SWEEP:
            raise
        found = f"refused: {error}"
    record(model_type, found)


def record(model_type, found):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"context_images-{model_type}.json").write_text(json.dumps({"cp2": found}))


@pytest.mark.ranks(2)
def test_images_far_into_a_sequence_are_seen_and_windows_are_found_without_them():
    """Beyond the first tokens, which say nothing of an image, and with a window that no size is told of."""
    mesh = context_mesh()
    one = small("gemma3")
    one.config.text_config.sliding_window = 20
    model = fully_shard(apply_cp(copy.deepcopy(one), mesh), mesh=mesh)
    images = batch_of(one, 2, False)
    text = torch.randint(3, 50, (2, 32), generator=torch.Generator().manual_seed(5))
    ids = torch.cat([text, images["input_ids"]], 1)
    kinds = torch.cat([torch.zeros_like(text), images["token_type_ids"]], 1)
    batch = {"input_ids": ids, "token_type_ids": kinds, "labels": ids.clone()}
    assert check(model, one, mesh, batch | {"pixel_values": images["pixel_values"]}) < TOLERANCE
    alone = {"input_ids": ids % 50, "token_type_ids": torch.zeros_like(kinds), "labels": ids.clone()}
    for module in (model, one):
        module.train()  # in which it asks for the kinds of tokens
    assert check(model, one, mesh, alone) < TOLERANCE


@pytest.mark.ranks(2)
def test_a_head_that_reads_ids_is_exact_with_images():
    from transformers import AutoModelForSequenceClassification

    mesh, config = context_mesh(), small("gemma3").config
    config.num_labels, config.text_config.pad_token_id = 3, 0
    torch.manual_seed(0)
    one = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64).eval()
    model = fully_shard(apply_cp(copy.deepcopy(one), mesh), mesh=mesh)
    batch = batch_of(small("gemma3"), 2, True)
    batch["input_ids"][batch["attention_mask"] == 0] = 0  # it pools the last token that is not this
    assert check(model, one, mesh, batch | {"labels": torch.tensor([2, 0])}) < TOLERANCE


@pytest.mark.ranks(2)
def test_a_head_that_does_something_else_with_ids_is_refused_with_images():
    model, mesh = small("llava"), context_mesh()
    shard = shard_batch(batch_of(model, 2, False), mesh)

    class Centred(type(model)):
        def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **others):
            given = {"input_ids": input_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
            out = super().forward(**given, **others)
            if input_ids is not None:
                out.logits = out.logits - out.logits.mean(1, keepdim=True)
            return out

    usual, model.__class__ = model.config._attn_implementation, Centred
    with pytest.raises(ValueError, match="in one way by their ids and in another by embeddings"):
        apply_cp(model, mesh, example_inputs=batch_of(model, 2, False))  # before anything is done to the model
    assert model.config._attn_implementation == usual
    with pytest.raises(ValueError, match="in one way by their ids and in another by embeddings"):
        apply_cp(model, mesh)(**shard)


@pytest.mark.ranks(2)
def test_calls_like_an_example_are_read_when_it_is_given_and_not_again():
    mesh, one = context_mesh(), small("gemma3")
    batch, model = batch_of(one, 2, True), copy.deepcopy(one)
    fully_shard(apply_cp(model, mesh, example_inputs=batch), mesh=mesh)
    with mock.patch("am_moe.context_parallel.apply.prove", side_effect=AssertionError("it is read again")):
        assert check(model, one, mesh, batch) < TOLERANCE


@pytest.mark.ranks(4)
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_images_on_some_data_ranks_train_as_in_one_process_with_context_ranks(model_type):
    world = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "cp"))
    one = small(model_type)
    model = copy.deepcopy(one)
    parallelize_model(model, world, None, dp_axis_names=("dp",), cp_axis_name="cp")
    images = batch_of(one, 2, True)
    text = {"input_ids": images["input_ids"] % 50, "labels": images["labels"] % 50}
    for batches in ((images, text), (text, images)):
        model(**shard_batch(batches[world["dp"].get_local_rank()], world["cp"])).loss.backward()
        for batch in batches:
            (one(**batch).loss / 2).backward()
        wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        assert_same({n: p.grad for n, p in model.named_parameters() if n in wanted}, wanted, TOLERANCE)
        model.zero_grad()
        one.zero_grad()


@pytest.mark.ranks(2)
def test_images_that_cannot_be_cut_are_refused_by_name():
    mesh = context_mesh()
    dropping = small("llava")
    dropping.config.vision_config.attention_dropout = 0.1
    apply_cp(dropping.train(), mesh)
    images = batch_of(small("llava"), 2, False)
    with pytest.raises(ValueError, match=r"has dropout in CLIPVisionConfig\.attention_dropout"):
        dropping(**shard_batch(images, mesh))
    seconds = torch.tensor([1.0, 2.0, 0.5])  # of three videos in two rows
    assert shard_batch(images | {"second_per_grid_ts": seconds}, mesh)["second_per_grid_ts"].equal(seconds)
    positions = torch.arange(images["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="takes no position_ids"):
        shard_batch(images | {"position_ids": positions}, mesh)


# What a stack may do with features of images that enter it for some tokens, and a rank's part of them would change.
MIXED = {
    "mean": lambda hidden, mask, rows: hidden + rows.mean(0),
    "count": lambda hidden, mask, rows: hidden * (1 + mask.sum() / 100),
    "others": lambda hidden, mask, rows: hidden.index_put((mask.roll(1, 1),), rows),
    "order": lambda hidden, mask, rows: hidden.index_put((mask,), rows.flip(0)),
    "same rows": lambda hidden, mask, rows: hidden + torch.cat([rows, rows])[: hidden.shape[1]],
}


@pytest.mark.ranks(2, timeout=180)
def test_features_of_images_that_a_stack_mixes_are_refused():
    mesh, model = context_mesh(), small("qwen3_vl")
    batch = batch_of(model, 2, False)
    del batch["labels"]
    shard = shard_batch(batch, mesh)
    apply_cp(model, mesh)
    for mix in MIXED.values():
        model.model.language_model._deepstack_process = mix
        with pytest.raises(ValueError, match="context parallelism is not right for Qwen3VL"):
            model(**shard)
