"""Images on some ranks only: every rank runs the tower, and training is that of one process.

One of each mechanism runs always; with `AM_SWEEP=folder` every type does, and leaves there what it measured.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.natural import natural_batch, natural_types, small_with_images

SWEEP = os.environ.get("AM_SWEEP")
# Features in place of embeddings; a grid and M-RoPE; features for several layers; a head without methods of towers.
MECHANISMS = ("llava", "qwen2_5_vl", "qwen3_vl", "deepseek_vl")
NEEDS_IMAGES = ("blip-2",)  # its forward has no form without
TYPES = [name for name in natural_types() if name not in NEEDS_IMAGES] if SWEEP else MECHANISMS
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = 1e-5


def text_only(model):
    return {"input_ids": torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(7))}


def expected_of(model, batches):
    """Outputs, and the average of the gradients of two ranks' batches."""
    outputs = []
    for batch in batches:
        logits = model(**batch).logits
        (logits.square().mean() / 2).backward()
        outputs.append(logits.detach())
    return outputs, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def off_by(model, logits, expected, wanted):
    largest = max(g.abs().max().item() for g in wanted.values())
    errors = [relative_error(whole(logits), expected, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            target = wanted.get(name, torch.zeros(parameter.shape, dtype=parameter.dtype))
            errors.append(relative_error(whole(parameter.grad), target, 1e-6 * largest))
        assert parameter.grad is not None or name not in wanted or wanted[name].abs().max() == 0, name
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def is_of_a_tower(name):
    return "vision" in name or "visual" in name or "image" in name


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=120)
def test_images_on_one_rank_train_as_in_one_process(model_type):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    found = {}
    for frozen in (False, True):
        one = small_with_images(model_type, layers=2)
        for name, parameter in one.named_parameters():
            parameter.requires_grad_(not (frozen and is_of_a_tower(name)))
        model = fsdp2_strategy_parallelize(copy.deepcopy(one), mesh, torch.float64)
        images, text = natural_batch(one, rows=2), text_only(one)
        for step, batches in enumerate([(images, text), (text, images), (text, text), (images, text)]):
            outputs, wanted = expected_of(one, batches)
            rank = dist.get_rank()
            try:
                logits = model(**batches[rank]).logits
            except ValueError as error:
                if not SWEEP:
                    raise
                found["frozen" if frozen else "trained"] = f"step {step} refused: {error}"
                break
            logits.square().mean().backward()
            error = off_by(model, logits, outputs[rank], wanted)
            assert error < TOLERANCE, f"step {step}, frozen={frozen}: off by {error:.1e}"
            found["frozen" if frozen else "trained"] = error
            model.zero_grad()
            one.zero_grad()
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"some_ranks-{model_type}.json").write_text(json.dumps(found))


@pytest.mark.ranks(2)
def test_images_on_one_rank_are_refused_where_batch_norms_would_count_those_that_are_made_up():
    model = small_with_images("llava", layers=2)
    model.model.multi_modal_projector.norm = torch.nn.BatchNorm1d(4, dtype=torch.float64)
    images, text = natural_batch(model, rows=2), text_only(model)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    model = fsdp2_strategy_parallelize(model.train(), mesh, torch.float64)
    with pytest.raises(ValueError, match="its batch norms would count what is made up"):
        model(**(text if dist.get_rank() else images))
