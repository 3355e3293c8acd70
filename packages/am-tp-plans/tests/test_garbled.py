"""Damaged configs are read or refused, whatever is in them, and soon."""

from __future__ import annotations

from transformers import LlamaConfig

from am_testkit.garbled import assert_configs_end_in_words
from am_tp_plans.__main__ import main


def test_a_damaged_config_ends_in_a_table_or_in_words(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=100)
    assert_configs_end_in_words(main, ["explain", "--tp", "2", str(tmp_path)], config)
