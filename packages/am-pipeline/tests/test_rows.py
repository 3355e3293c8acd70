"""Models that compute over the sequences of a batch are found, whatever operator does it, and no others."""

from __future__ import annotations

import pytest
import torch

from am_pipeline import plan_cut
from am_testkit.models import tiny

MIXES = {
    "the mean of the batch": lambda x: x - x.mean(0),
    "the mean of everything": lambda x: x - x.mean(),
    "a norm of everything": lambda x: x / x.norm(),
    "a softmax over the batch": lambda x: x.softmax(0),
    "a sum over the batch": lambda x: x + torch.cumsum(x, 0),
    "a layer norm of whole sequences and rows": lambda x: torch.layer_norm(x.mT.reshape(-1), (x.numel(),)).view_as(x),
    "the row before": lambda x: x + x.roll(1, 0),
    "rows in reverse": lambda x: x + x.flip(0),
    "rows by size": lambda x: x.sort(0).values,
    "products of all tokens": lambda x: x + (x.flatten(0, 1).T @ x.flatten(0, 1))[0],
    "products of rows": lambda x: torch.einsum("bsd,csd->bsd", x, x),
}
OF_A_ROW = {
    "the mean of tokens": lambda x: x - x.mean(1, keepdim=True),
    "the token before": lambda x: x + x.roll(1, 1),
    "a norm of each row": lambda x: x / x.flatten(1).norm(dim=1)[:, None, None],
    "products of a row's tokens": lambda x: (x @ x.mT).softmax(-1) @ x,
    "counts of the batch, in integers": lambda x: x + 0 * (x > 0).sum(),
}


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.1", "model.layers.1.mlp", "model.norm"])
def test_the_place_and_the_operator_are_told(where):
    mixes = mixed_by(MIXES["the mean of the batch"], where)
    assert (mixes.operator, mixes.module) == ("mean", where)


@pytest.mark.parametrize("kind", MIXES)
def test_what_goes_over_sequences_is_found(kind):
    assert mixed_by(MIXES[kind]) is not None


@pytest.mark.parametrize("kind", OF_A_ROW)
def test_what_goes_over_one_is_not(kind):
    assert mixed_by(OF_A_ROW[kind]) is None


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text"])
def test_models_of_transformers_do_not(family):
    assert plan_cut(tiny(family), 2).reading.mixes is None


def mixed_by(change, where="model.layers.1"):
    model = tiny("llama")
    model.get_submodule(where).register_forward_hook(lambda module, args, output: change(output))
    return plan_cut(model, 2).reading.mixes
