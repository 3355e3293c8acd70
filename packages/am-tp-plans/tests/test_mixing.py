"""Toy blocks whose activation mixes features in one way or another: a plan is exact on two ranks, or it is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_tp_plans import PackedColwiseParallel, apply_plan
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.sources.translate import complete

WIDTH = 24
STYLES = {
    "colwise": lambda: ColwiseParallel(),
    "halves": lambda: PackedColwiseParallel(2),
    "thirds": lambda: PackedColwiseParallel(3),
    "unequal": lambda: PackedColwiseParallel([16, 8]),
}


def rotated(x):
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def attention(split):
    def attend(x):
        q, k, v = (t.transpose(1, 2) for t in split(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)

    return attend


def linear_attention(x):
    q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in x.chunk(3, -1))
    state = torch.zeros(k.shape[0], k.shape[1], 4, 4, dtype=k.dtype)
    out = torch.zeros_like(v)
    for token in range(k.shape[2]):
        state = state + k[:, :, token, :, None] * v[:, :, token, None, :]
        out[:, :, token] = (q[:, :, token, :, None] * state).sum(-2)
    return out.transpose(1, 2).flatten(-2)


def grouped(x):
    q, k = x.split([x.shape[-1] * 2 // 3, x.shape[-1] // 3], -1)
    q, k = q.unflatten(-1, (-1, 4)), k.unflatten(-1, (-1, 4))
    return (q * k.repeat_interleave(2, -2)).flatten(-2)


def into_a_buffer(x):
    buffer = torch.zeros(*x.shape[:-1], WIDTH, dtype=x.dtype)
    buffer[..., : x.shape[-1]] = x
    return buffer


def conv_over_features(x):
    return F.conv1d(x.flatten(0, 1)[:, None], SCORES[:1, None, :3].to(x.dtype), padding=1)[:, 0].view_as(x)


def sloped(x):
    return (x.unflatten(-1, (-1, 4)) * torch.arange(x.shape[-1] // 4)[:, None]).flatten(-2)


def for_every_head(x):
    """Heads `(B, S, H, 4)` repeated as often as there are heads."""
    heads = x.unflatten(-1, (-1, 4))
    return heads.unsqueeze(-1).expand(*heads.shape, heads.shape[-2])


def weighed_for_every_head(x):
    repeated = for_every_head(x)
    return (repeated @ torch.ones(repeated.shape[-1], 1, dtype=x.dtype)).squeeze(-1).flatten(-2)


SCORES = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ORDER = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
# name: (columns that go back, the activation, with which styles of `up` it is exact)
BLOCKS = {
    "gelu": (24, F.gelu, "colwise"),
    "glu": (12, F.glu, "halves"),
    "gated by its other half": (12, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], "halves"),
    "gated by every second": (12, lambda x: x[..., ::2] * x[..., 1::2].sigmoid(), "colwise"),
    "gated by thirds": (8, lambda x: (lambda a, b, c: a * b.sigmoid() + c)(*x.chunk(3, -1)), "thirds"),
    "a gate that reads all features": (24, lambda x: x * x.mean(-1, keepdim=True), ""),
    "softmax": (24, lambda x: x.softmax(-1), ""),
    "softmax within heads": (24, lambda x: x.unflatten(-1, (-1, 4)).softmax(-1).flatten(-2), "colwise"),
    "softmax over heads": (24, lambda x: x.unflatten(-1, (-1, 4)).softmax(-2).flatten(-2), ""),
    "group norm": (24, lambda x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2), ""),
    "batch norm": (24, lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2), ""),
    "layer norm": (24, lambda x: F.layer_norm(x, x.shape[-1:]), ""),
    "rms": (24, lambda x: x * x.square().mean(-1, keepdim=True).rsqrt(), ""),
    "normalize": (24, lambda x: F.normalize(x, dim=-1), ""),
    "normalize over tokens": (24, lambda x: F.normalize(x, dim=1), "colwise"),
    "mean subtracted": (24, lambda x: x - x.mean(-1, keepdim=True), ""),
    "mean of everything": (24, lambda x: x / x.abs().mean(), ""),
    "largest": (24, lambda x: x / x.abs().amax(), ""),
    "scaled by its width": (24, lambda x: x / math.sqrt(x.shape[-1]), ""),
    "scaled by a tensor of its width": (24, lambda x: x / torch.tensor(float(x.shape[-1])), ""),
    "scaled by the number of heads": (24, lambda x: x.unflatten(-1, (-1, 4)).flatten(-2) / (x.shape[-1] // 4), ""),
    "rotated halves": (24, rotated, ""),
    "rotated halves of heads": (24, lambda x: rotated(x.unflatten(-1, (-1, 4))).flatten(-2), "colwise"),
    "rotated halves of a fixed number of heads": (24, lambda x: rotated(x.unflatten(-1, (6, -1))).flatten(-2), ""),
    "halves interleaved": (24, lambda x: torch.stack(x.chunk(2, -1), -1).flatten(-2), "halves"),
    "channel shuffle": (24, lambda x: x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), "halves"),
    "channel shuffle by groups": (24, lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), ""),
    "maxout": (12, lambda x: x.unflatten(-1, (-1, 2)).amax(-1), "colwise"),
    "maxout of a fixed number": (12, lambda x: x.unflatten(-1, (12, -1)).amax(-1), ""),
    "maxout of halves": (12, lambda x: x.unflatten(-1, (2, -1)).amax(-2), "halves"),
    "cumsum": (24, lambda x: x.cumsum(-1), ""),
    "cumsum over tokens": (24, lambda x: x.cumsum(1), "colwise"),
    "logsumexp": (24, lambda x: x * x.logsumexp(-1, keepdim=True), ""),
    "sort": (24, lambda x: x.sort(-1).values, ""),
    "topk": (12, lambda x: x.topk(x.shape[-1] // 2, -1).values, ""),
    "flip": (24, lambda x: x.flip(-1), ""),
    "flip of tokens": (24, lambda x: x.flip(1), "colwise"),
    "roll": (24, lambda x: x.roll(1, -1), ""),
    "roll of tokens": (24, lambda x: x.roll(1, 1), "colwise"),
    "roll of everything": (24, lambda x: x.roll(1), ""),
    "pad": (26, lambda x: F.pad(x, (1, 1)), ""),
    "pad of tokens": (24, lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1], "colwise"),
    "gather": (24, lambda x: x.gather(-1, ORDER.expand(x.shape)), ""),
    "permuted": (24, lambda x: x[..., ORDER], ""),
    "every feature with every other": (24, lambda x: (x[..., None] * x[..., None, :]).sum(-1), ""),
    "conv over features": (24, conv_over_features, ""),
    "unfold over features": (24, lambda x: F.pad(x, (1, 1)).unfold(-1, 3, 1).sum(-1), ""),
    "unfold over tokens": (24, lambda x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1), "colwise"),
    "fft": (24, lambda x: torch.fft.fft(x, dim=-1).real, ""),
    "fft over tokens": (24, lambda x: torch.fft.fft(x, dim=1).real, "colwise"),
    "einsum over tokens": (24, lambda x: torch.einsum("st,btf->bsf", SCORES.to(x.dtype), x), "colwise"),
    "einsum over features": (24, lambda x: torch.einsum("bsf,btf->bst", x, x) @ x, ""),
    "masked by column": (24, lambda x: x * (torch.arange(x.shape[-1]) < 5), ""),
    "added up for every head": (24, lambda x: for_every_head(x).sum(-1).flatten(-2), ""),
    "multiplied for every head": (24, lambda x: for_every_head(x).prod(-1).flatten(-2), ""),
    "the norm for every head": (24, lambda x: for_every_head(x).norm(dim=-1).flatten(-2), ""),
    "weighed for every head": (24, weighed_for_every_head, ""),
    "a slope for every head": (24, sloped, ""),
    "written in place": (24, lambda x: x.clone().mul_(2).clamp_(-1, 1), "colwise"),
    "written into a buffer": (24, into_a_buffer, ""),
    "attention": (8, attention(lambda x: (t.unflatten(-1, (-1, 4)) for t in x.chunk(3, -1))), "thirds"),
    "attention fused in front": (8, attention(lambda x: x.unflatten(-1, (3, -1, 4)).unbind(2)), "thirds"),
    "attention fused by head": (8, attention(lambda x: x.unflatten(-1, (-1, 12)).chunk(3, -1)), "colwise"),
    "attention that halves the tokens": (8, attention(lambda x: (t.reshape(2, -1, 2, 4) for t in x.chunk(3, -1))), ""),
    "linear attention": (8, linear_attention, "thirds"),
    "grouped heads": (16, grouped, "unequal"),
}  # fmt: skip


class Block(nn.Module):
    """A layer of two linears with an activation between them."""

    def __init__(self, columns, activation):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, WIDTH), nn.Linear(columns, 8)
        self.activation = activation

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return hidden + self.down(self.activation(self.up(hidden)))


def is_accepted(model, style):
    plan = {"up": style(), "down": RowwiseParallel()}
    try:
        return rehearse(model, check_plan(model, plan, 2), 2).ran == {"up", "down"}
    except ValueError:
        return False


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_mixes_features_is_refused_where_a_share_is_not_enough(name):
    columns, activation, exact = BLOCKS[name]
    model = Block(columns, activation).double()
    assert {style for style in STYLES if is_accepted(model, STYLES[style])} == set(exact.split())


@pytest.mark.ranks(2)
def test_every_block_that_is_not_refused_is_exact():
    for name, (columns, activation, exact) in BLOCKS.items():
        torch.manual_seed(0)
        one = Block(columns, activation).double()
        ids = torch.randint(0, 16, (2, 8))
        expected = one(ids)
        expected.square().sum().backward()
        for style in exact.split():
            model = copy.deepcopy(one)
            model.zero_grad()
            plan = complete(model, {"up": STYLES[style](), "down": RowwiseParallel()})
            apply_plan(model, init_device_mesh(device_type(), (2,)), plan)
            output = model(ids)
            output.square().sum().backward()
            assert_same(whole(output), expected, 1e-12, f"the output with {name}")
            assert_same(gradients(model), gradients(one), 1e-10, f"the gradients with {name}")
