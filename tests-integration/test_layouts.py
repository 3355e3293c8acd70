"""The five packages together: every composition trains like one process, from one table of layouts.

The model is laid out by the code of `docs/examples`, which is what users start from.
"""

from __future__ import annotations

import copy
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import am_fsdp
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

from training.degrees import Degrees
from training.layout import lay_out

# pp, dp, tp, ep, sequence parallel, and cp where it is not 1
DENSE = [
    (2, 1, 1, 1, False),
    (1, 2, 1, 1, False),
    (1, 1, 2, 1, False),
    (1, 1, 2, 1, True),
    (2, 2, 1, 1, False),
    (2, 1, 2, 1, False),
    (2, 1, 2, 1, True),
    (1, 2, 2, 1, False),
    (1, 2, 2, 1, True),
    (4, 1, 1, 1, False),
    (2, 2, 2, 1, False),
    (2, 2, 2, 1, True),
]
EXPERTS = [
    (1, 2, 1, 2, False),
    (2, 2, 1, 2, False),
    (1, 4, 1, 2, False),
    (1, 2, 2, 2, False),
    (2, 2, 2, 2, True),
    (2, 4, 1, 2, False),
]
CONTEXT = [
    (1, 1, 1, 1, False, 2),
    (2, 1, 1, 1, False, 2),
    (1, 2, 1, 1, False, 2),
    (1, 1, 2, 1, False, 2),
    (2, 1, 2, 1, False, 2),
    (2, 2, 1, 1, False, 2),
    (2, 1, 1, 1, False, 4),
]
EXPERTS_IN_CONTEXT = [
    (1, 1, 1, 2, False, 2),
    (2, 1, 1, 2, False, 2),
    (1, 2, 1, 2, False, 2),
    (1, 2, 1, 4, False, 2),
    (2, 2, 1, 4, False, 2),
    (2, 1, 2, 2, False, 2),
]
CASES = [
    pytest.param(family, tied, layout, id=f"{family}{'-tied' * tied}-{_name}", marks=pytest.mark.ranks(_ranks))
    for family, tied, layouts in (
        ("qwen3", True, DENSE),
        ("llama", False, DENSE[-2:]),
        ("qwen3_moe", False, DENSE + EXPERTS),
        ("qwen3", True, CONTEXT),
        ("mistral", False, [layout for layout in CONTEXT if layout[0] == 1 or layout[2] == 1]),  # its plan is derived
        ("qwen3_moe", False, EXPERTS_IN_CONTEXT),
    )
    for layout in layouts
    for _cp in [layout[5] if len(layout) > 5 else 1]
    for _ranks in [layout[0] * layout[1] * layout[2] * _cp]
    for _name in ["pp{}-dp{}-tp{}-ep{}".format(*layout[:4]) + "-sp" * layout[4] + f"-cp{_cp}" * (_cp > 1)]
]


@pytest.mark.parametrize(("family", "tied", "layout"), CASES)
def test_a_layout_trains_like_one_process(family, tied, layout):
    degrees = Degrees(*layout)
    # Eager attention computes its softmax in float32, attention over a context axis does not.
    how = {"attention": "sdpa"} if degrees.cp > 1 else {}
    how |= {"sliding_window": 5} if family == "mistral" else {}
    model = tiny(family, tied=tied, num_key_value_heads=4, **how)
    whole = copy.deepcopy(model)
    world_mesh, expert_mesh = degrees.world_mesh("cpu"), degrees.expert_mesh("cpu")
    local = 16 // degrees.dp
    laid_out = lay_out(
        model,
        degrees,
        world_mesh,
        expert_mesh,
        schedule="1F1B",
        microbatch=2,
        local_batch=local,
        device=torch.device("cpu"),
    )
    # The models compute softmax and norms in float32. Where a gradient is nothing but that rounding, AdamW's usual eps
    # would make a whole step of it; 1e-6 keeps such elements still.
    settings = {"lr": 1e-3, "eps": 1e-6, "foreach": False}
    optimizers = [torch.optim.AdamW(m.parameters(), **settings) for m in (*laid_out.parts, whole)]
    mine = slice(world_mesh.get_local_rank("dp") * local, (world_mesh.get_local_rank("dp") + 1) * local)
    for step in range(3):
        tolerance = 1e-6 if step == 0 else 1e-5
        ids, labels = token_batch(16, 16 if degrees.cp > 1 else 12, seed=step)
        loss = laid_out.step(ids[mine], labels[mine])
        logits = whole(ids, use_cache=False).logits
        expected = next_token_loss(logits, labels)
        expected.backward()
        if loss is not None:
            total = loss.clone()
            for axis in ("dp", "cp") if degrees.cp > 1 else ("dp",):
                dist.all_reduce(total, group=world_mesh.get_group(axis))
            assert_same(total / (degrees.dp * degrees.cp), expected, tolerance, f"loss of step {step}")
        for part in laid_out.parts:
            assert_same(gradients(part), gradients(whole), tolerance, f"gradients of step {step}")
        norm = am_fsdp.clip_grad_norm_(
            [p for part in laid_out.parts for p in part.parameters()],
            0.1,
            pipeline_shards=degrees.pp,
            duplicates=laid_out.duplicates,
        )
        assert_same(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1), tolerance, f"norm of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    for part in laid_out.parts:
        assert_same(dict(part.named_parameters()), weights, 1e-5, "weights after three clipped steps")
