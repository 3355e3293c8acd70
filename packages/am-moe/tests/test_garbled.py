"""Damaged configs are read or refused, whatever is in them, and soon."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from am_moe.__main__ import main
from am_testkit.garbled import assert_configs_end_in_words


def test_a_damaged_config_ends_in_a_table_or_in_words(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3MoeConfig(**sizes, vocab_size=100, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    assert_configs_end_in_words(main, ["explain", "--ep", "2", str(tmp_path)], config)
