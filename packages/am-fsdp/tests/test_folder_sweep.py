"""Every causal language model of transformers, models of images and text, encoder-decoders and encoders with heads: a
folder read onto meta and written back, against `from_pretrained`.

Every third type runs always, and all under `nox -s sweep`.
"""

from __future__ import annotations

import os

import pytest
import torch
import transformers

from am_fsdp import load_hf_weights, save_hf_weights
from am_testkit.natural import natural_types, small_with_images
from am_testkit.zoo import NOT_BUILT, model_types, small, small_config

WITH_HEADS = [
    ("AutoModelForSeq2SeqLM", "t5"),
    ("AutoModelForSeq2SeqLM", "bart"),
    ("AutoModelForSeq2SeqLM", "pegasus"),
    ("AutoModelForSpeechSeq2Seq", "whisper"),
    ("AutoModelForMaskedLM", "bert"),
    ("AutoModelForMaskedLM", "modernbert"),
    ("AutoModelForSequenceClassification", "deberta-v2"),
    ("AutoModelForImageClassification", "vit"),
    ("AutoModelForImageClassification", "siglip"),
]
SWEEP = os.environ.get("AM_SWEEP")
TYPES = [name for name in model_types() if name not in NOT_BUILT]


@pytest.mark.parametrize("model_type", TYPES if SWEEP else TYPES[1::3])
def test_every_model_is_read_as_from_pretrained_reads_it_and_written_so_that_it_can(tmp_path, model_type):
    check_round_trip(small(model_type, dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("model_type", natural_types() if SWEEP else natural_types()[::6])
def test_models_of_images_and_text_are_read_and_written(tmp_path, model_type):
    check_round_trip(small_with_images(model_type, layers=2, dtype=torch.float32), tmp_path)


@pytest.mark.parametrize(("auto", "model_type"), WITH_HEADS)
def test_encoder_decoders_and_heads_are_read_and_written(tmp_path, auto, model_type):
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(small_config(model_type, layers=2), dtype=torch.float32)
    check_round_trip(model.eval(), tmp_path)


def check_round_trip(model, tmp_path):
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
