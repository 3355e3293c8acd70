"""Damaged schedule files are read or refused, whatever is in them, and soon."""

from __future__ import annotations

from transformers import LlamaConfig

from am_pipeline.__main__ import main
from am_pipeline.schedule.order import read_order, schedule_order
from am_testkit.garbled import assert_configs_end_in_words, garbled


def written(name, ranks=2, microbatches=4):
    rows = schedule_order(name, ranks, microbatches)
    return "\n".join(",".join(map(str, row)) for row in rows).encode()


def test_a_damaged_schedule_file_is_read_or_refused(tmp_path):
    valid = [written(name) for name in ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")]
    valid.append(b"0F0,(0F1;1B0)OVERLAP_F_B,,0B0\n1F0,1F1,1B1")
    path, read = tmp_path / "order.csv", 0
    for text in garbled(valid, ["0F0", "1B1", "2W3", "(0F1;1B0)OVERLAP_F_B", "F", "B", "I", "W", "0UNSHARD", "SEND_F"]):
        path.write_bytes(text)
        try:
            order = read_order(str(path), 2)
        except ValueError:
            continue
        read += 1
        assert len(order) == 2
    assert read, "some damage is none, such as a blank more"


def test_a_damaged_config_ends_in_a_table_or_in_words(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=100)
    assert_configs_end_in_words(main, ["plan", "--ranks", "2", str(tmp_path)], config)
