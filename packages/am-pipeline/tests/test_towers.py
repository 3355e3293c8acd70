"""A vision tower over stages of its own, before the decoder's: exact, or refused, or whole on the first stage."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import pipeline_model
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.models import next_token_loss
from am_testkit.natural import natural_batch, small_with_images

# Patches of a tower's own, patches of all images in one tensor, padded images beside real ones.
MECHANISMS = ("llava", "qwen2_5_vl", "idefics3")


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
@pytest.mark.ranks(2, timeout=180)
def test_a_tower_cut_over_stages_trains_like_one_process(schedule):
    for model_type in MECHANISMS:
        model = small_with_images(model_type)
        batches = [natural_batch(model, rows=2, seed=seed) for seed in range(2)]
        labels = [torch.where(b["input_ids"] < 50, b["input_ids"], 3) for b in batches]
        expected = [model(**batch, use_cache=False).logits for batch in batches]
        (sum(next_token_loss(logits, label) for logits, label in zip(expected, labels, strict=True)) / 2).backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        model.zero_grad()
        built = build(model, schedule, batches[0])
        tower, decoder = built[4][0].plan.anatomy.depths
        assert (tower, decoder) == (4, 4)
        logits = call(built, batches, labels)
        errors = [relative_error(logits, torch.cat(expected), 0.0)] if built[3] else []
        largest = max(gradient.abs().max().item() for gradient in wanted.values())
        for part in built[1]:
            for name, parameter in part.named_parameters(remove_duplicate=False):
                if parameter.grad is not None or (name in wanted and wanted[name].abs().max() > 0):
                    assert parameter.grad is not None, f"{name} has no gradient"
                    target = wanted.get(name, torch.zeros_like(parameter))
                    errors.append(relative_error(parameter.grad, target, 1e-6 * largest))
        worst = torch.tensor(max(errors), dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        assert worst.item() < 1e-9, f"{model_type} is off by {worst.item():.1e}"


def build(model, schedule, example, **settings):
    mesh = init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    given = {"microbatch_size": 2, "local_batch_size": 4, "loss_fn": next_token_loss, "scale_grads": True}
    given |= {"balance": "layers", "example_inputs": example}
    return pipeline_model(model, mesh, pipeline_parallel_schedule=schedule, **given | settings)


def call(built, batches, labels, word="step"):
    schedule, _, first, last, _ = built
    further = {name: [batch[name] for batch in batches] for name in batches[0] if name != "input_ids"} if first else {}
    ids = torch.cat([batch["input_ids"] for batch in batches])
    target = torch.cat(labels) if last else None
    return getattr(schedule, word)(*((ids,) if first else ()), target=target, **further)
