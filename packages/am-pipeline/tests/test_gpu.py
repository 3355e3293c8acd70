"""Stages of one rank on a GPU, which hand their outputs on there; `nox -s gpu` runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import build_pipeline_schedule, split_model_into_stages
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@pytest.mark.parametrize("moved", ["before", "by the pipeline"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble"])
@pytest.mark.ranks(1, timeout=120)
def test_stages_of_one_rank_train_as_the_whole_model(schedule, family, moved):
    model = tiny(family, layers=4, tied=True, attention="sdpa")
    whole = copy.deepcopy(model).to(DEVICE)
    if moved == "before":
        model = model.to(DEVICE)
    ids, labels = (t.to(DEVICE) for t in token_batch(8, 12))
    expected = whole(ids, use_cache=False).logits
    expected_loss = next_token_loss(expected, labels)
    expected_loss.backward()
    mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("pp",))
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    stages, parts = split_model_into_stages(model, mesh, "pp", schedule, device, layers_per_stage=2)
    assert len(parts) == 2
    steps = build_pipeline_schedule(None, schedule, 2, 8, stages, next_token_loss, scale_grads=True)
    for _ in range(2):
        for part in parts:
            part.zero_grad()
        losses = []
        logits = steps.step(ids, target=labels, losses=losses)
    assert_same(logits, expected, 1e-12, "logits")
    assert_same(torch.stack(losses).mean(), expected_loss, 1e-12, "loss")
    for part in parts:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")
