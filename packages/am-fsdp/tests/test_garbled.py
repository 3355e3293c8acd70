"""Damaged folders are read or refused, whatever is in their files, and soon."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from am_fsdp import load_hf_weights
from am_fsdp.__main__ import main
from am_fsdp.weights.hf_folder import INDEX, SINGLE
from am_testkit.garbled import assert_configs_end_in_words, garbled

TENSORS = {"0.weight": torch.ones(4, 2), "0.bias": torch.ones(4), "1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}


def model():
    return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))


def load(folder):
    """Whether the folder was read; all of it, then."""
    target = model()
    try:
        load_hf_weights(target, folder)
    except ValueError:
        return False
    assert all(bool((p == 1).all()) for p in target.parameters())
    return True


def test_a_damaged_index_is_read_or_refused(tmp_path):
    files = {"a.safetensors": ["0.weight", "0.bias"], "b.safetensors": ["1.weight", "1.bias"]}
    for file, keys in files.items():
        save_file({key: TENSORS[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    valid = json.dumps({"metadata": {"total_size": 108}, "weight_map": weight_map}).encode()
    words = ['"weight_map"', '"metadata"', '"a.safetensors"', '"0.weight"', '{"0.weight": "b.safetensors"}', "[1]"]
    read = 0
    for text in garbled([valid], words):
        (tmp_path / INDEX).write_bytes(text)
        read += load(tmp_path)
    assert read, "what is in the metadata does not matter"


def test_a_damaged_header_is_read_or_refused(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    read = 0
    for header in garbled([whole[:length]], ['"F32"', '"F64"', '"shape"', "[4,2]", '"data_offsets"', '"0.weight"']):
        (tmp_path / SINGLE).write_bytes(header + whole[length:])
        read += load(tmp_path)
    assert read, "what follows the header is aligned with blanks"


def test_a_damaged_config_ends_in_a_table_or_in_words(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=100)
    assert_configs_end_in_words(main, ["plan", "--dp", "2", str(tmp_path)], config)
