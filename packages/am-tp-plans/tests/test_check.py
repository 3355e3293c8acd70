"""The backstop, dropout, and the arithmetic of fused weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.nn import functional as F
from transformers import GPT2DoubleHeadsModel

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small
from am_tp_plans import apply_plan, check_gradients, infer_plan, resolve_plan
from am_tp_plans.proof.check import random_settings
from am_tp_plans.styles.fused import plan_exchange


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.ranks(2)
def test_a_gradient_that_nobody_sums_is_found_after_the_first_backward(sequence_parallel):
    ids, labels = token_batch(2, 12)
    for forgotten in (None, "model.layers.*.self_attn.q_norm"):
        model, mesh = tiny("qwen3"), axis()
        plan = resolve_plan(model, sequence_parallel=sequence_parallel)
        plan = {key: style for key, style in plan.items() if key != forgotten}
        apply_plan(model, mesh, plan)
        # without its style, q_norm has a plain weight on a rank's own heads
        next_token_loss(model(ids, use_cache=False).logits, labels).backward()
        if forgotten is None:
            check_gradients(model, mesh)
            model.model.norm.weight.grad = None if dist.get_rank() else model.model.norm.weight.grad
            with pytest.raises(RuntimeError, match=r"1 of \d+ .*model\.norm\.weight"):
                check_gradients(model, mesh)
        else:
            with pytest.raises(
                RuntimeError, match=r"4 of \d+ parameters .*model\.layers\.0\.self_attn\.q_norm\.weight"
            ):
                check_gradients(model, mesh)


@pytest.mark.ranks(2)
def test_dropout_drops_alike_what_is_whole_and_other_seeds_are_refused():
    """In training mode, with dropout on everything but attention, whose heads are on different ranks."""
    model = small("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0).train()
    whole = copy.deepcopy(model)
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    apply_plan(model, axis(), infer_plan(model))
    ids, labels = token_batch(2, 12, vocab_size=60)
    for each in (model, whole):
        torch.manual_seed(7)
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")
    plan = infer_plan(other)
    torch.manual_seed(dist.get_rank())
    with pytest.raises(ValueError, match=r"different random states .*call torch\.manual_seed"):
        apply_plan(other, axis(), plan)


@pytest.mark.ranks(2)
def test_a_gradient_that_nobody_sums_is_found_under_fsdp2_and_what_cannot_be_checked_is_named():
    mesh = init_device_mesh(device_type(), (1, 2), mesh_dim_names=("dp", "tp"))
    ids, labels = token_batch(2, 12)
    for forgotten in (False, True):
        model = tiny("qwen3")
        plan = resolve_plan(model)
        apply_plan(model, mesh["tp"], {k: s for k, s in plan.items() if not (forgotten and k.endswith("_norm"))})
        fully_shard(model, mesh=mesh["dp"])
        with pytest.raises(RuntimeError, match=r"none of the \d+ parameters .* has a gradient"):
            check_gradients(model, mesh["tp"])
        next_token_loss(model(ids, use_cache=False).logits, labels).backward()
        if forgotten:
            with pytest.raises(RuntimeError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
                check_gradients(model, mesh["tp"])
        else:
            assert check_gradients(model, mesh["tp"]) == ()
            model.model.norm.weight.grad = None
            assert check_gradients(model, mesh["tp"]) == ("model.norm.weight",)


@pytest.mark.ranks(2)
def test_gradients_that_are_not_finite_are_said_to_be_so_and_not_to_differ():
    ids, labels = token_batch(2, 12)
    for value, on in (("nan", (0, 1)), ("inf", (1,))):
        model, mesh = tiny("llama", layers=1), axis()
        apply_plan(model, mesh, resolve_plan(model))
        next_token_loss(model(ids, use_cache=False).logits, labels).backward()
        if dist.get_rank() in on:
            model.model.norm.weight.grad[3] = float(value)
        with pytest.raises(RuntimeError, match=r"1 of \d+ .* not finite .*: model\.norm\.weight\. Look at the loss"):
            check_gradients(model, mesh)


def test_a_number_of_a_config_that_no_module_reads_is_no_dropout():
    model = small("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.1)
    assert random_settings(model) == []
    assert random_settings(GPT2DoubleHeadsModel(model.config)) != []
    assert random_settings(small("mixtral", layers=1, router_jitter_noise=0.1)) != []


@pytest.mark.ranks(2)
def test_functional_dropout_and_generators_that_ran_apart_are_found():
    class Dropped(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.linear, self.drop_rate = nn.Linear(4, 4), p

        def forward(self, x):
            return F.dropout(self.linear(x), self.drop_rate, self.training)

    torch.manual_seed(0)
    if dist.get_rank():
        torch.rand(1)  # the same seed, but one draw further
    apply_plan(nn.Sequential(Dropped(0.0)), axis(), {"0.linear": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"dropout or noise \(Dropped.drop_rate=0.1\), but .* different random states"):
        apply_plan(nn.Sequential(Dropped(0.1)), axis(), {"0.linear": ColwiseParallel()})
    noisy = small("mixtral", layers=1, router_jitter_noise=0.1)
    if dist.get_rank():
        torch.rand(1)
    with pytest.raises(ValueError, match=r"dropout or noise \(.*jitter_noise=0.1"):
        apply_plan(noisy, axis(), resolve_plan(noisy))


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_rows_of_a_fused_weight_reach_the_rank_that_uses_them_in_order(ranks, units):
    widths = [ranks * unit for unit in units]
    rows = sum(widths) // ranks
    plans = [plan_exchange(widths, ranks, rank) for rank in range(ranks)]
    received = [[] for _ in range(ranks)]
    for rank, (order, sends, _) in enumerate(plans):
        assert sorted(order) == list(range(rows))
        start = 0
        for other, count in enumerate(sends):
            assert plans[other][2][rank] == count
            received[other] += [rank * rows + row for row in order[start : start + count]]
            start += count
    starts = [sum(widths[:part]) for part in range(len(widths))]
    for rank, got in enumerate(received):
        share = [(start + rank * unit, unit) for start, unit in zip(starts, units, strict=True)]
        assert got == [row for start, unit in share for row in range(start, start + unit)]
