"""What surrounds the grouped products: the same numbers from Triton's kernels as from torch's operators."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from am_moe.expert_parallel import common_form, kernels
from am_moe.expert_parallel.common_form import gates_by_silu, run_common_form
from am_moe.expert_parallel.ordering import by_expert
from am_testkit.exact import relative_error

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}


def halves(h):
    return h.chunk(2, -1)


GATES = {
    "silu": (lambda h: nn.functional.silu(halves(h)[0]) * halves(h)[1], True),
    "silu in other words": (lambda h: halves(h)[1] * halves(h)[0] * halves(h)[0].sigmoid(), True),
    "gelu": (lambda h: nn.functional.gelu(halves(h)[0]) * halves(h)[1], False),
    "the halves the other way round": (lambda h: nn.functional.silu(halves(h)[1]) * halves(h)[0], False),
    "gate and up in turns": (lambda h: nn.functional.silu(h[..., ::2]) * h[..., 1::2], False),
    "limited above": (lambda h: nn.functional.silu(halves(h)[0].clamp(max=1e4)) * halves(h)[1], False),
    "limited below": (lambda h: nn.functional.silu(halves(h)[0]) * halves(h)[1].clamp(min=-7), False),
    "one added": (lambda h: nn.functional.silu(halves(h)[0]) * (halves(h)[1] + 1), False),
    "of another width": (lambda h: nn.functional.silu(h), False),
    "steeper": (lambda h: halves(h)[0] * (1.0001 * halves(h)[0]).sigmoid() * halves(h)[1], False),
}


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_known_by_its_numbers(gate):
    function, is_silu = GATES[gate]
    assert gates_by_silu(function) == is_silu


def test_rows_are_added_up_in_float32_and_those_without_any_are_zero():
    # A sum that rounds after each row would stay at 256.
    rows, index = torch.ones(600, 8).bfloat16(), torch.randperm(600)
    sums = kernels.add_up(rows, index, torch.tensor([0, 500, 500, 600]))
    assert sums.tolist() == [[500.0] * 8, [0.0] * 8, [100.0] * 8]


def test_a_training_step_asks_for_the_fused_activation_forward_and_backward(monkeypatch):
    """Inside a node, an input still says that it requires a gradient: going by that, forward never asked."""
    asked = []
    monkeypatch.setattr(kernels, "gated_silu", lambda h, weights: asked.append("forward"))
    monkeypatch.setattr(kernels, "gated_silu_backward", lambda h, weights, da: asked.append("backward"))
    monkeypatch.setattr(common_form, "_is_gated_silu", lambda module: True)
    module = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=8, moe_intermediate_size=8, num_experts=2))
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x, ids = torch.randn(5, 8, requires_grad=True), torch.randint(0, 2, (5, 2))
    weights = torch.rand(5, 2, requires_grad=True)
    gradients = []
    order = by_expert(ids, 2, None)
    for run in (lambda: run_common_form(module, order, 1.0, x, weights), lambda: module(x, ids, weights)):
        gradients.append(torch.autograd.grad(run().square().sum(), [x, weights, *module.parameters()]))
    assert asked == ["forward", "backward"]
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) <= 1e-5


@gpu
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("number", "width"), [(1, 8), (37, 40), (1000, 768), (64, 4096), (0, 64)])
def test_kernels_of_a_device_give_what_torchs_operators_give(dtype, number, width):
    torch.manual_seed(0)
    x = torch.randn(11, width, device="cuda").to(dtype)
    source = torch.randint(0, 11, (number,), device="cuda")
    assert torch.equal(kernels.take(x, source), x[source])
    wider = torch.randn(11, width + 8, device="cuda").to(dtype)
    assert torch.equal(kernels.take(wider[:, :width], source), wider[source, :width])

    rows, index = torch.randn(number, width, device="cuda").to(dtype), torch.randperm(number, device="cuda")
    start = torch.tensor([0, 0, number // 3, number // 3, number], device="cuda")
    bags = [rows[index[a:b]].float().sum(0) for a, b in itertools.pairwise(start.tolist())]
    error = relative_error(kernels.add_up(rows, index, start).float(), torch.stack(bags))
    assert error <= ROUNDING[dtype]

    h = torch.randn(number, 2 * width, device="cuda").to(dtype)
    weights, da = torch.rand(number, device="cuda"), torch.randn(number, width, device="cuda").to(dtype)
    leaves = h.float().requires_grad_(), weights.clone().requires_grad_()
    wanted = GATES["silu"][0](leaves[0]) * leaves[1][:, None]
    wanted_dh, wanted_dw = torch.autograd.grad(wanted, leaves, da.float())
    a = kernels.gated_silu(h, weights)
    dh, dw, again = kernels.gated_silu_backward(h, weights, da.clone())
    assert torch.equal(a, again)
    for actual, expected in ((a, wanted), (dh, wanted_dh), (dw, wanted_dw)):
        assert actual.shape == expected.shape
        if number:
            assert relative_error(actual.float(), expected) <= ROUNDING[dtype]
