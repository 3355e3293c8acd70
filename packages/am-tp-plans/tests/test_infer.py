"""Plans inferred from structure: what is found, and what is refused because it would be wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from am_testkit.heads import inputs_for, small_for
from am_testkit.zoo import small
from am_tp_plans import (
    Conv1DRowwiseParallel,
    HeadsPerRank,
    PackedColwiseParallel,
    ReplicatedWithGradAllReduce,
    Several,
    SharedInput,
    VocabParallelEmbedding,
    infer_plan,
)
from am_tp_plans.proof.rehearsal import rehearse


def test_attention_and_mlp_of_flat_layers_are_found():
    plan = infer_plan(small("opt"))
    layer = "model.decoder.layers.*"
    kinds = {key.removeprefix(f"{layer}."): type(style) for key, style in plan.items() if key.startswith(layer)}
    attention = {f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"} | {"self_attn.out_proj": RowwiseParallel}
    assert kinds == attention | {"self_attn": Several, "fc1": ColwiseParallel, "fc2": RowwiseParallel}
    heads, shared = plan[f"{layer}.self_attn"].styles
    assert heads.attributes == ("num_heads",)
    assert isinstance(shared, SharedInput)
    assert isinstance(plan["model.decoder.embed_tokens"], VocabParallelEmbedding)


class Block(nn.Module):
    """An MLP whose forward is `how` of its two linears, between an embedding and nothing."""

    def __init__(self, how):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})])
        self.how = how

    def forward(self, ids):
        hidden = self.embed(ids)
        layer = self.layers[0]
        return hidden + self.how(layer["up"], layer["down"], hidden)


def test_biases_with_a_column_for_every_head_are_sharded_with_the_heads():
    """Those of T5, which the first layer makes for all of them."""
    model = small_for("translation", "t5")
    plan = infer_plan(model, example_inputs=inputs_for(model, "translation", 2))
    for stack in ("encoder", "decoder"):
        attention = f"{stack}.block.*.layer.*.SelfAttention"
        assert isinstance(plan[f"{attention}.relative_attention_bias"], ColwiseParallel)
        assert isinstance(plan[f"{attention}.q"], ColwiseParallel)


def test_fused_projections_in_a_conv1d_are_found():
    plan = infer_plan(small("gpt2"))
    assert plan["transformer.h.*.attn.c_attn"].parts == 3
    assert isinstance(plan["transformer.h.*.mlp.c_proj"], Conv1DRowwiseParallel)
    assert plan["transformer.h.*.attn"].attributes == ("num_heads", "embed_dim", "split_size")


def test_a_norm_of_a_ranks_own_heads_has_its_gradient_summed():
    plan = infer_plan(small("persimmon"))
    assert isinstance(plan["model.layers.*.self_attn.q_layernorm"], ReplicatedWithGradAllReduce)


def swapped_halves(up, down, hidden):
    left, right = up(hidden).chunk(2, dim=-1)
    return down(torch.cat([right, left], dim=-1))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (swapped_halves, r"takes apart \(split\) features"),
        (lambda up, down, x: down(up(x).view(*x.shape[:-1], 1, 8).flatten(-2)), None),
        (lambda up, down, x: down(up(x).softmax(-1)), "takes the _softmax over features"),
        (lambda up, down, x: down(up(x).sum(-1, keepdim=True) * x), "takes the sum over features"),
        (
            lambda up, down, x: down(up(x).unflatten(-1, (2, -1)).flatten(-2)),
            r"it computes view to \(2, 8, 2, 2\) on one rank's share",
        ),
    ],
)
def test_what_needs_features_of_other_ranks_is_not_inferred(how, words):
    model = Block(how)
    plan = {"layers.0.up": ColwiseParallel(), "layers.0.down": RowwiseParallel()}
    with pytest.raises(ValueError, match=words or "fails in layers.0 with RuntimeError|fails with RuntimeError"):
        rehearse(model, plan, 2)
    with pytest.raises(ValueError, match="nothing in Block was found that can be sharded over 2 ranks"):
        infer_plan(model)


def test_what_the_rehearsal_did_not_run_is_not_offered():
    assert infer_plan(Block(lambda up, down, x: down(up(x).relu()))).keys() == {"layers.*.up", "layers.*.down"}
    with pytest.raises(ValueError, match="nothing in Block"):
        infer_plan(Block(lambda up, down, x: x))


def test_a_number_made_of_the_number_of_heads_and_a_constant_per_head_are_found_out():
    class Attention(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.num_heads, self.scale = 2, scale

        def forward(self, hidden):
            return (hidden.unflatten(-1, (self.num_heads, -1)) * self.scale(self.num_heads)).flatten(-2)

    class Model(Block):
        def __init__(self, scale):
            super().__init__(None)
            self.layers[0]["attention"] = Attention(scale)

        def forward(self, ids):
            layer, hidden = self.layers[0], self.embed(ids)
            return hidden + layer["down"](layer["attention"](layer["up"](hidden)))

    plan = {"layers.0.up": ColwiseParallel(), "layers.0.down": RowwiseParallel()}
    plan["layers.0.attention"] = HeadsPerRank(["num_heads"])
    assert rehearse(Model(lambda heads: 0.5), plan, 2).partial == frozenset()
    with pytest.raises(ValueError, match=r"it computes mul of all features and 0\.7071"):
        rehearse(Model(lambda heads: heads**-0.5), plan, 2)
    with pytest.raises(ValueError, match=r"a whole tensor \(2, 1\), which has values for all of them"):
        rehearse(Model(lambda heads: torch.arange(1.0, heads + 1)[:, None]), plan, 2)
    with pytest.raises(ValueError, match="it computes lift_fresh of other constants"):
        rehearse(Model(lambda heads: torch.tensor(heads**-0.5)), plan, 2)
    with pytest.raises(ValueError, match="num_heads=2 does not divide over 4 ranks"):
        rehearse(Model(lambda heads: 0.5), plan, 4)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda x: sum(x.chunk(3, -1)), None),
        (lambda x: sum(x.unflatten(-1, (3, -1)).unbind(-2)), None),
        (lambda x: torch.cat(x.chunk(3, -1), -1)[..., :8], r"wants one rank's contiguous columns|\(2, 8, 4\)|fails"),
        (lambda x: torch.cat(x.chunk(3, -1)[:2], -1), r"contiguous columns, but gets fused features \[8, 8\]"),
        (lambda x: x.unflatten(-1, (3, 8)).sum(-2), "fails with RuntimeError"),
        (lambda x: sum(x.chunk(2, -1)), r"takes fused features \[8, 8, 8\] apart at \[0, 12, 24\]"),
        (lambda x: x.split([4, x.shape[-1] - 4], -1)[0], r"\[8, 8, 8\] apart at \[0, 4, 24\]"),
        (lambda x: x.unflatten(-1, (-1, 2)).flatten(-2), r"contiguous columns, but gets fused features \[8, 8, 8\]"),
    ],
)
def test_fused_features_may_only_be_taken_apart_into_their_projections(how, words):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.qkv, self.out = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, ids):
            return self.out(how(self.qkv(self.embed(ids))))

    plan = {"qkv": PackedColwiseParallel(3), "out": RowwiseParallel()}
    if words is None:
        assert rehearse(Model(), plan, 2).ran == {"qkv", "out"}
    else:
        with pytest.raises(ValueError, match=words):
            rehearse(Model(), plan, 2)
