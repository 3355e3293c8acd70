"""Dropout on tensor ranks: alike where values are whole, different where they are shares, the same when recomputed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from am_testkit.device import device_type
from am_testkit.models import tiny
from am_testkit.zoo import small
from am_tp_plans import (
    SequenceWholeBlock,
    add_sequence_parallelism,
    apply_plan,
    check_gradients,
    expand_plan,
    infer_plan,
    resolve_plan,
)
from am_tp_plans.proof import rehearsal
from am_tp_plans.proof.rehearsal import rehearse_training
from am_tp_plans.styles.random_numbers import draw_for_shares
from am_tp_styles.simulated import on_simulated_ranks

IDS = torch.arange(16).view(2, 8)
RATES = {
    "llama": {"attention_dropout": 0.3},
    "gpt2": {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1},
    "bert": {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.2},
    "opt": {"dropout": 0.2, "attention_dropout": 0.3},
}
# Whether every dropout of a forward, in order, sees whole values: of the embedding, then of two layers.
WHOLE = {
    "llama": [False] * 2,
    "gpt2": [True, *[False, True, True] * 2],
    "bert": [True, *[False, True, True] * 2],
    "opt": [False, True, True] * 2,
}
WHOLE_IN_SEQUENCE = {"llama": [False] * 2, "gpt2": [True, *[False] * 6], "bert": [True, *[False] * 6]}


def training(name, sequence=False, attention="eager"):
    if name == "llama":
        model = tiny(name, attention=attention, layers=2, **RATES[name])
        plan = resolve_plan(model, sequence_parallel=sequence)
    else:
        model = small(name, attention=attention, layers=2, **RATES[name])
        plan = infer_plan(model)
        plan = add_sequence_parallelism(model, plan) if sequence else plan
    torch.manual_seed(0)
    mesh = init_device_mesh(device_type(), (2,))
    return apply_plan(model, mesh, plan).train(), mesh


def everyones(tensor):
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def masks_of(model, monkeypatch):
    """What every dropout of a forward dropped, and the logits."""
    masks, real = [], F.dropout

    def spy(x, p=0.5, training=True, inplace=False):
        kept = real(torch.ones_like(x), p, training)
        if training and p:
            masks.append((kept == 0).byte())
        return x * kept

    monkeypatch.setattr(F, "dropout", spy)
    torch.manual_seed(7)
    logits = model(IDS).logits.detach()
    monkeypatch.undo()
    return masks, logits


CASES = [(name, False, whole) for name, whole in WHOLE.items()]
CASES += [(name, True, whole) for name, whole in WHOLE_IN_SEQUENCE.items()]


@pytest.mark.parametrize(("name", "sequence", "whole"), CASES)
@pytest.mark.ranks(2)
def test_whole_values_are_dropped_alike_and_shares_differently(name, sequence, whole, monkeypatch):
    model, mesh = training(name, sequence)
    masks, logits = masks_of(model, monkeypatch)
    pairs = [everyones(mask) for mask in masks]
    assert [first.equal(second) for first, second in pairs] == whole
    assert len({(mask.shape, *mask.flatten().tolist()) for mask in masks}) == len(masks), "no two layers drop the same"
    first, second = everyones(logits)
    assert first.equal(second)
    model(IDS).logits.square().mean().backward()
    check_gradients(model, mesh)
    first, second = everyones(torch.get_rng_state())
    assert first.equal(second), "the common state is common afterwards"


def step(model, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(IDS).logits.square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), {n: (g.to_local() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"), [("gpt2", "eager"), ("gpt2", "sdpa"), ("bert", "sdpa"), ("llama", "eager")]
)
@pytest.mark.ranks(2, timeout=120)
def test_a_recomputed_layer_and_a_resumed_run_draw_the_same(name, attention, sequence):
    model, _ = training(name, sequence, attention)
    loss, gradients = step(model)
    again, same = step(model)
    other, _ = step(model, seed=4)
    assert loss.equal(again)
    assert not loss.equal(other)
    assert all(same[n].equal(g) for n, g in gradients.items())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        recomputed, theirs = step(model)
        assert recomputed.equal(loss)
        for n, gradient in gradients.items():
            torch.testing.assert_close(theirs[n], gradient, rtol=1e-9, atol=1e-12, msg=n)
        first, second = everyones(torch.get_rng_state())
        assert first.equal(second)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.ranks(2)
def test_evaluation_draws_nothing_and_an_error_in_a_layer_leaves_the_common_state(sequence):
    model, _ = training("gpt2", sequence)
    before = torch.get_rng_state()
    model.eval()
    model(IDS)
    assert torch.get_rng_state().equal(before)
    model.train()
    broken = model.transformer.h[1].mlp.act.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    broken.remove()
    first, second = everyones(torch.get_rng_state())
    assert first.equal(second)
    assert not first.equal(before)
    first, second = everyones(step(copy.deepcopy(model))[0])
    assert first.equal(second)


@pytest.mark.ranks(2)
def test_several_forwards_before_a_backward_are_recomputed_each_with_its_own_numbers():
    model, _ = training("gpt2")

    def two(recompute):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model.zero_grad()
        losses = [model(ids).logits.square().mean() for ids in (IDS, IDS.flip(0))]
        (losses[0] * 2 + losses[1]).backward()
        return model.transformer.h[0].attn.c_attn.weight.grad.to_local().clone()

    torch.testing.assert_close(two(False), two(True), rtol=1e-9, atol=1e-12)


@pytest.mark.ranks(2)
def test_dropout_of_a_block_that_sees_the_whole_sequence_between_parts_is_refused():
    model = small("gpt2", layers=2)
    plan = add_sequence_parallelism(model, infer_plan(model))
    plan = {key: style for key, style in plan.items() if ".mlp" not in key} | {
        "transformer.h.*.mlp": SequenceWholeBlock()
    }
    for layer in model.transformer.h:
        layer.mlp.dropout.p = 0.1
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp has dropout and sees the whole sequence"):
        apply_plan(model, init_device_mesh(device_type(), (2,)), plan)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_model_without_dropout_is_left_as_it_is():
    model = small("gpt2", layers=2)
    classes = [type(module) for module in model.modules()]
    plan = expand_plan(model, infer_plan(model))
    for rank in on_simulated_ranks(2, lambda axis: draw_for_shares(model, plan, axis, shards_sequence=False)):
        assert rank is None
    assert [type(module) for module in model.modules()] == classes


class Attention(nn.Module):
    """Drops what it is told to between its projections."""

    def __init__(self, drops):
        super().__init__()
        self.up, self.down, self.drop, self.drops = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5), drops

    def forward(self, hidden):
        inner = self.up(hidden)
        hidden = self.drop(hidden) if self.drops == "whole" else hidden
        inner = self.drop(inner) if self.drops == "share" else inner
        noise = torch.rand(inner.shape[:-1])[..., None] if self.drops == "tokens" else 1
        return hidden + self.down(inner * noise)


class Model(nn.Module):
    def __init__(self, drops):
        super().__init__()
        self.embed, self.layers = nn.Embedding(16, 8), nn.ModuleList(Attention(drops) for _ in range(2))

    def forward(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_a_whole_value_dropped_where_ranks_draw_differently_is_refused():
    assert {"layers.*.up", "layers.*.down"} <= set(infer_plan(Model("share")))
    with pytest.raises(ValueError, match=r"draws \(bernoulli_\) for a whole value, in layers.0.drop what every rank"):
        infer_plan(Model("whole"))
    with pytest.raises(
        ValueError, match=r"draws \(rand\) for a whole value, in layers.0 what every rank draws differently"
    ):
        infer_plan(Model("tokens"))
    still = Model("whole")
    for layer in still.layers:
        layer.drop.p = 0.0
    assert "layers.*.up" in infer_plan(still)


def test_a_share_dropped_where_ranks_draw_alike_is_refused(monkeypatch):
    model = Model("share")
    plan = expand_plan(model, infer_plan(model))
    state = torch.get_rng_state()
    rehearse_training(model, plan, 2)
    assert torch.get_rng_state().equal(state)
    monkeypatch.setattr(rehearsal, "ends_of_shares", lambda *_, **__: [])  # as if no rank had a state of its own
    with pytest.raises(ValueError, match=r"draws \(bernoulli_\) for one rank's share, in layers.0.drop what all ranks"):
        rehearse_training(model, plan, 2)
