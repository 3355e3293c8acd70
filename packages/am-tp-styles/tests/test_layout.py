"""The layout of a layer as plain data: no process group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from am_tp_styles.layout import is_wrapped, plan_layout
from am_tp_styles.vocabulary import rows_here


def wrap(layer, **options):
    return get_peft_model(nn.Sequential(layer), LoraConfig(r=3, target_modules=["0"], **options)).base_model.model[0]


def test_the_layouts_of_a_wrapped_linear_are_those_of_the_table():
    s0, s1, whole = Shard(0), Shard(1), Replicate()
    names = ["base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"]
    table = {"column": [s0, s0, whole, s0, s0], "row": [s1, whole, s1, whole, whole], "sequence": [whole] * 5}
    for options, last in (
        ({"use_dora": True}, "lora_magnitude_vector.default.weight"),
        ({"lora_bias": True}, "lora_B.default.bias"),
    ):
        layer = wrap(nn.Linear(8, 12), **options)
        assert is_wrapped(layer)
        for kind, placements in table.items():
            assert plan_layout(layer, kind, 2) == dict(zip([*names, last], placements, strict=True))


def test_the_layouts_of_a_wrapped_embedding_are_those_of_the_table():
    layer = wrap(nn.Embedding(10, 8), use_dora=True)
    s0, s1, whole = Shard(0), Shard(1), Replicate()
    names = ["base_layer.weight", "lora_embedding_A.default", "lora_embedding_B.default"]
    names += ["lora_magnitude_vector.default.weight"]
    table = {"rows": [s0, s1, whole, whole], "features": [s1, whole, s0, s0]}
    for kind, placements in table.items():
        assert plan_layout(layer, kind, 2) == dict(zip(names, placements, strict=True))


@given(features=st.integers(1, 40), ranks=st.integers(1, 9))
def test_a_layout_is_refused_exactly_when_a_rank_would_be_empty_or_rows_would_not_divide(features, ranks):
    shares = [len(part) for part in torch.arange(features).chunk(ranks)]
    everyone = len(shares) == ranks
    for kind, layer, fits in (
        ("column", nn.Linear(2, features), everyone),
        ("rows", nn.Embedding(features, 2), everyone),
        ("row", nn.Linear(features, 2), len(set(shares)) == 1 and everyone),
    ):
        if fits:
            assert plan_layout(layer, kind, ranks)
        else:
            with pytest.raises(ValueError, match=f"={features} "):
                plan_layout(layer, kind, ranks)


@given(ids=st.integers(1, 40), ranks=st.integers(1, 9), padding=st.integers(0, 39))
def test_every_id_lies_on_one_rank_in_the_row_that_chunk_gives_it(ids, ranks, padding):
    shares = torch.arange(ids).chunk(ranks)
    found = []
    for rank, share in enumerate(shares):
        axis = SimpleNamespace(size=ranks, rank=rank)
        rows, here, padding_here = rows_here(torch.arange(ids), len(share), ids, axis, padding % ids)
        assert torch.arange(ids)[here].equal(share)
        assert rows[here].tolist() == list(range(len(share)))
        found += [share[padding_here].item()] if padding_here is not None else []
    assert found == [padding % ids]


def test_an_id_outside_the_vocabulary_is_in_no_ranks_rows():
    for rank in range(3):
        held = [4, 4, 2][rank]
        rows, here, _ = rows_here(torch.tensor([-3, 10, 500]), held, 10, SimpleNamespace(size=3, rank=rank), None)
        assert rows.tolist() == [held] * 3
        assert not here.any()
