"""Rows are ordered once, added up once, and computed by grouped products as by the module's own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from am_moe.expert_parallel.common_form import has_common_form, product, products
from am_moe.expert_parallel.dispatch import Received
from am_moe.expert_parallel.experts import describe
from am_moe.expert_parallel.local_experts import run_local_experts
from am_moe.expert_parallel.ordering import by_expert, by_rank
from am_moe.expert_parallel.payload import pack, unpack
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.models import tiny
from am_testkit.zoo import OLDEST, small


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.randoms(use_true_random=False))
def test_choices_are_ordered_by_expert_and_every_row_gets_its_own_back(rows, choices, local, known, random):
    ids = torch.tensor([[random.randint(0, local + 1) for _ in range(choices)] for _ in range(rows)], dtype=torch.int64)
    ids = ids.reshape(rows, choices)
    here = (ids < local).flatten()
    order = by_expert(ids, local, int(here.sum()) if known else None)
    wanted = sorted((e, i) for i, e in enumerate(ids.flatten().tolist()) if e < local)
    assert order.choice_N[: len(wanted)].tolist() == [i for _, i in wanted]
    assert order.ends_L.tolist() == [sum(e <= expert for e, _ in wanted) for expert in range(local)]
    assert order.rows.source[: len(wanted)].tolist() == [i // choices for _, i in wanted]
    values = torch.full((len(order.choice_N), 2), float("nan"), dtype=torch.float64)
    values[: len(wanted)] = torch.arange(2.0 * len(wanted), dtype=torch.float64).view(-1, 2) + 1
    expected = torch.zeros(rows, 2, dtype=torch.float64)
    for place, (_, i) in enumerate(wanted):
        expected[i // choices] += values[place]
    assert torch.equal(order.rows.sum(values), expected), "what nobody wants, here NaN, reaches no row"


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 3), st.randoms(use_true_random=False))
def test_tokens_are_listed_rank_by_rank_and_added_up_token_by_token(tokens, ranks, room, random):
    needs = torch.tensor([[random.random() < 0.5 for _ in range(ranks)] for _ in range(tokens)]).reshape(tokens, ranks)
    needs = needs.bool()
    wanted = [(p, t) for p in range(ranks) for t in range(tokens) if needs[t, p]]
    rank_S, rows = by_rank(needs, len(wanted) + room * tokens)
    rows = rows.first(len(wanted))
    assert list(zip(rank_S[: len(wanted)].tolist(), rows.source.tolist(), strict=True)) == wanted
    values = torch.arange(1.0, len(wanted) + 1, dtype=torch.float64)[:, None]
    expected = torch.zeros(tokens, 1, dtype=torch.float64)
    for place, (_, token) in enumerate(wanted):
        expected[token] += values[place]
    assert torch.equal(rows.sum(values), expected)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_payload_holds_tensors_of_any_dtype_bit_for_bit(rows):
    tensors = [torch.randn(rows, 3, dtype=torch.bfloat16), torch.randn(rows, 5, dtype=torch.float64)]
    tensors += [torch.randint(0, 9, (rows, 2), dtype=torch.int32), torch.randn(rows, 4).expand(rows, 4)]
    payload = pack(tensors)
    assert payload.shape == (rows, 16 + 48 + 16 + 16)
    for found, expected in zip(unpack(payload, tensors), tensors, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(8, 12), (7, 9)])
def test_products_of_each_expert_are_the_same_with_and_without_a_grouped_kernel(dtype, sizes):
    torch.manual_seed(0)
    ends = torch.tensor([4, 4, 7], dtype=torch.int32)
    a, weight, b = (torch.randn(*shape, dtype=dtype) for shape in ((10, sizes[0]), (3, *sizes), (10, sizes[1])))
    expected = torch.cat([a[:4] @ weight[0], a[4:7] @ weight[2]])
    assert_same(product(a, weight, ends)[:7], expected, 1e-6)
    both = torch.stack([a[:4].t() @ b[:4], torch.zeros(sizes, dtype=dtype), a[4:7].t() @ b[4:7]])
    assert_same(products(a, b, ends), both, 1e-6)


def experts_of(model_type, dtype):
    model = small(model_type, layers=2, dtype=dtype)
    model.set_experts_implementation("eager")
    module = next(m for m in model.modules() if describe("", m) is not None)
    return module, describe("", module)


TYPES = ["mixtral", "gpt_oss", "nemotron_h", "aria_text", "minimax_m3_vl_text"]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_common_form_computes_what_the_modules_own_forward_does(model_type, dtype, known):
    if OLDEST and model_type == "aria_text":
        pytest.skip("its experts are not stacked in this transformers")
    module, experts = experts_of(model_type, dtype)
    assert has_common_form(module, experts)
    torch.manual_seed(0)
    width = module.down_proj.shape[2 if model_type in ("gpt_oss", "aria_text") else 1]
    ids = torch.tensor([[0, 1], [3, 3], [4, 2], [4, 4], [1, 4], [0, 2]])  # 4 means no expert; one occurs twice
    results = []
    for own in (False, True):
        module.zero_grad()
        x = torch.randn(6, width, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weights = torch.rand(6, 2, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if own:
            out = torch.zeros_like(x)
            for token, choice in (ids < 4).nonzero().tolist():
                row = module(x[token][None], ids[token, choice].view(1, 1), weights[token, choice].view(1, 1))
                out = out.index_add(0, torch.tensor([token]), row)
        else:
            out = run_local_experts(module, experts, 4, 1.0, Received(x, ids, weights, None, 8 if known else None))
        (out**2).sum().backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        results.append([out, x.grad, weights.grad, *gradients])
    tolerance = 1e-5 if dtype is torch.float32 or model_type == "nemotron_h" else 1e-12
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected, tolerance)
    assert results[0][2][3].abs().max() == 0


def test_a_token_that_chose_nobody_poisons_nobody():
    module, experts = experts_of("mixtral", torch.float32)
    x = torch.randn(3, 32)
    x[1] = float("inf")
    x.requires_grad_()
    weights = torch.ones(3, 1, requires_grad=True)
    out = run_local_experts(module, experts, 4, 1.0, Received(x, torch.tensor([[0], [4], [3]]), weights, None))
    out.sum().backward()
    tensors = [out, x.grad, weights.grad, *(p.grad for p in module.parameters())]
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_gradients_that_nobody_needs_are_not_computed_and_others_are_scaled():
    module, experts = experts_of("mixtral", torch.float64)
    one = copy.deepcopy(module)
    module.gate_up_proj.requires_grad_(False)
    x = torch.randn(4, 32, dtype=torch.float64)
    ids, weights = torch.tensor([[0], [1], [2], [3]]), torch.ones(4, 1, dtype=torch.float64)
    run_local_experts(module, experts, 4, 0.25, Received(x, ids, weights, None)).sum().backward()
    one(x, ids, weights).sum().backward()
    assert module.gate_up_proj.grad is None
    assert_same(module.down_proj.grad, one.down_proj.grad / 4, 1e-12)


def test_what_is_not_of_the_common_form_keeps_its_own_forward():
    for model_type in ("longcat_flash", "dbrx", "jetmoe", "llama4_text"):
        if not (OLDEST and model_type == "dbrx"):
            module = next(m for m in small(model_type, layers=1).modules() if describe("", m) is not None)
            assert not has_common_form(module, describe("", module)), model_type
    module, experts = experts_of("mixtral", torch.float32)
    module.extra = nn.Parameter(torch.zeros(4, 2))
    assert not has_common_form(module, describe("", module)), "a parameter that the common form does not know"
    del module.extra
    with torch.autocast(device_type(), torch.bfloat16):
        assert not has_common_form(module, experts)


def test_half_precision_weighs_the_activation_and_adds_up_in_float32():
    model = tiny("mixtral", layers=1, dtype=torch.float32)
    exact = model.model.layers[0].mlp.experts
    experts = describe("", exact)
    module = copy.deepcopy(exact).bfloat16()
    torch.manual_seed(0)
    x, (weights, ids) = torch.randn(64, 32), torch.rand(64, 8).topk(4)
    half = run_local_experts(module, experts, 8, 1.0, Received(x.bfloat16(), ids, weights.bfloat16(), None))
    assert half.dtype is torch.bfloat16
    model.set_experts_implementation("eager")
    assert_same(half, exact(x, ids, weights), 2e-2)
