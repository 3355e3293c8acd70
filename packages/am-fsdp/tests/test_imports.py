"""Import paths, and leaving the process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import am_fsdp


def test_a_path_names_a_class():
    assert am_fsdp.import_class_from_path("torch.optim.AdamW") is torch.optim.AdamW
    assert am_fsdp.import_classes_from_paths(["torch.nn.Linear", "torch.Tensor"]) == [torch.nn.Linear, torch.Tensor]
    assert am_fsdp.import_classes_from_paths(None) == []


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("AdamW", ValueError, "must look like"),
        (None, ValueError, "must look like"),
        ("no_such_module.Thing", ImportError, "cannot import 'no_such_module'"),
        ("torch.optim.NoSuch", ImportError, "'torch.optim' has no 'NoSuch'"),
    ],
)
def test_a_wrong_path_is_an_error_and_never_skipped(path, error, words):
    with pytest.raises(error, match=words):
        am_fsdp.import_classes_from_paths(["torch.nn.Linear", path])


@pytest.mark.ranks(2)
def test_the_connection_is_destroyed_once_and_again():
    am_fsdp._destroy_dist_connection()
    assert not dist.is_initialized()
    am_fsdp._destroy_dist_connection()
