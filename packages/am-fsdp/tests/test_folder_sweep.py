"""Every causal language model of transformers: a folder read onto meta and written back, against `from_pretrained`.

Every third type runs always, and all under `nox -s sweep`.
"""

from __future__ import annotations

import os

import pytest
import torch

from am_fsdp import load_hf_weights, save_hf_weights
from am_testkit.zoo import NOT_BUILT, model_types, small

TYPES = [name for name in model_types() if name not in NOT_BUILT]


@pytest.mark.parametrize("model_type", TYPES if os.environ.get("AM_SWEEP") else TYPES[1::3])
def test_every_model_is_read_as_from_pretrained_reads_it_and_written_so_that_it_can(tmp_path, model_type):
    model = small(model_type, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    expected = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    with torch.device("meta"):
        loaded = type(model)._from_config(model.config, dtype=torch.float32).train(model.training)
    load_hf_weights(loaded, tmp_path / "theirs")
    assert_equal(loaded, expected)
    save_hf_weights(expected, tmp_path / "ours", max_shard_size="40KB")
    again, found = type(model).from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert_equal(again, expected)


def assert_equal(model, expected):
    """Parameters and buffers, persistent or not, bitwise."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, expected))
        assert set(mine) == set(theirs)
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert tensor.nan_to_num().equal(theirs[name].nan_to_num()), name
