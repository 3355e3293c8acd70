"""Layers that torch.compile traces train as the model does: every style's collectives keep their gradients there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.gpt2.modeling_gpt2
import transformers.models.phi3.modeling_phi3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small
from am_tp_plans import apply_plan, infer_plan, resolve_plan, vocab_parallel_cross_entropy
from am_tp_plans.styles.fused import exchange_rows
from am_tp_styles.axis import MeshAxis
from am_tp_styles.communication import sum_gradients, sum_over_ranks


@pytest.mark.parametrize(
    ("family", "sequence_parallel"), [("phi3", False), ("phi3", True), ("qwen3_moe", True), ("gpt2", False)]
)
@pytest.mark.ranks(2, timeout=180)
def test_compiled_layers_train_as_the_model_in_one_process(family, sequence_parallel):
    model = small("gpt2", dtype=torch.float64).train() if family == "gpt2" else tiny(family, layers=1)
    one = copy.deepcopy(model)
    ids, labels = token_batch(2, 12, vocab_size=60)
    expected = one(ids, use_cache=False).logits
    next_token_loss(expected, labels).backward()
    if family == "gpt2":
        plan, layers = infer_plan(model, ranks=2), model.transformer.h
    else:
        plan, layers = resolve_plan(model, sequence_parallel=sequence_parallel), model.model.layers
    apply_plan(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",)), plan)
    for layer in layers:
        layer.compile(backend="eager")
    logits = model(ids, use_cache=False).logits
    next_token_loss(logits, labels).backward()
    assert_same(logits, expected, 1e-5, "logits")
    assert_same(gradients(model), gradients(one), 1e-5, "gradients")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.ranks(2, timeout=120)
def test_the_gradient_of_every_sum_and_exchange_survives_a_compiler(backend):
    axis = MeshAxis(init_device_mesh(device_type(), (2,)))
    labels = torch.tensor([0, 2])
    functions = {
        "sum_gradients": lambda x: sum_gradients(x, axis) * 3,
        "sum_over_ranks": lambda x: sum_over_ranks(x * 3, axis),
        "rows": lambda x: exchange_rows(x, [4, 2, 2], axis) * 3,
        "loss": lambda x: vocab_parallel_cross_entropy(x[:2], labels),
    }
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    for name, function in functions.items():
        results = []
        for run in (function, torch.compile(function, backend=backend)):
            mine = x.clone().requires_grad_()
            out = run(mine)
            out.square().sum().backward()
            results.append((out.detach(), mine.grad))
        assert results[0][1].norm() > 0.1, name
        assert_same(*(out for out, _ in results[::-1]), 1e-6, name)
        assert_same(*(gradient for _, gradient in results[::-1]), 1e-6, f"gradient of {name}")
