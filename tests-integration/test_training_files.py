"""Checkpoints of docs/examples: manifests from outside, order by number, runs that are set aside."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

from training import checkpoint, manifest, start

pytestmark = pytest.mark.skipif(os.environ.get("WORLD_SIZE", "2") != "2", reason="once, with the two-rank suite")

ENTRY = {"bytes": 3, "sha256": "0" * 64}


def rewritten(text):
    return lambda folder: (folder / manifest.NAME).write_text(text)


def entries(value):
    return rewritten(json.dumps({"files": value}))


DAMAGE = {
    "nothing": (lambda folder: None, None),
    "no manifest": (lambda folder: (folder / manifest.NAME).unlink(), "manifest.json is missing"),
    "no files": (entries({}), "is no manifest: it lists no files"),
    "a list": (entries(["a"]), "is no manifest"),
    "null": (entries(None), "is no manifest"),
    "not a dict": (rewritten("[1]"), "is no manifest"),
    "an entry without a digest": (entries({"a": {"bytes": 3}}), "entries of another form"),
    "an entry that is a number": (entries({"a": 3}), "entries of another form"),
    "a size that is text": (entries({"a": ENTRY | {"bytes": "3"}}), "entries of another form"),
    "a name outside": (entries({"../a": ENTRY}), "entries of another form"),
    "nested": (rewritten("[" * 200_000), "is no manifest"),
    "not text": (lambda folder: (folder / manifest.NAME).write_bytes(b"\xff\xfe"), "is no manifest"),
    "overlong": (lambda folder: os.truncate(folder / manifest.NAME, manifest.LARGEST + 1), "is no manifest"),
    "a file that is not listed": (lambda folder: (folder / "more").touch(), "more is not in the manifest"),
    "a file that is gone": (lambda folder: (folder / "a").unlink(), "a is missing"),
    "other bytes": (lambda folder: (folder / "a").write_text("xyz"), "a holds other bytes"),
    "more bytes": (lambda folder: (folder / "a").write_text("abcd"), "a has 4 bytes instead of 3"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.ranks(2)
def test_damage_is_said_in_words_on_every_rank(tmp_path, name):
    import torch.distributed as dist

    change, words = DAMAGE[name]
    paths = [str(tmp_path)]
    dist.broadcast_object_list(paths, src=0)
    folder = pathlib.Path(paths[0])
    if dist.get_rank() == 0:
        for file in ("a", "b"):
            (folder / file).write_text("abc")
    dist.barrier()
    manifest.write(folder)
    dist.barrier()
    if dist.get_rank() == 0:
        change(folder)
    dist.barrier()
    found = manifest.damage(folder)
    heard = [None, None]
    dist.all_gather_object(heard, found)
    assert heard[0] == heard[1]
    assert not found if words is None else words in "; ".join(found)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-999998", "step-999999", "step-1000000", "step-1000001", "step-old", "step-000001x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / manifest.NAME).touch()
    (tmp_path / "latest").write_text("step-1000000")
    assert [path.name for path in checkpoint.newest_first(tmp_path)] == ["step-1000000", "step-999999", "step-999998"]
    for text in ("", "../elsewhere/step-000001", "step-x"):
        (tmp_path / "latest").write_text(text)
        assert checkpoint.newest_first(tmp_path) == []


def test_every_run_that_was_set_aside_is_kept(tmp_path):
    for number in range(3):
        (tmp_path / "step-000008").mkdir()
        (tmp_path / "latest").write_text("step-000008")
        (tmp_path / "losses.txt").write_text(str(number))
        start._set_aside(tmp_path)
        assert not (tmp_path / "latest").exists()
    kept = {name: (tmp_path / name / "losses.txt").read_text() for name in ("before", "before-2", "before-3")}
    assert kept == {"before": "0", "before-2": "1", "before-3": "2"}
    start._set_aside(tmp_path)
    assert not (tmp_path / "before-4").exists()
