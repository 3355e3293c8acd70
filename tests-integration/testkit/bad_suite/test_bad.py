"""Tests that go wrong in every way, each between two that are fine. The kit's own tests run this and look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist


def meet():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()


@pytest.mark.ranks(2)
def test_fine_before():
    meet()


@pytest.mark.ranks(2)
def test_ranks_ask_for_a_folder_before_their_parent_did(tmp_path_factory):
    if dist.get_rank():
        meet()
    mine = tmp_path_factory.mktemp(f"of-rank{dist.get_rank()}-")
    if not dist.get_rank():
        meet()
    meet()
    assert mine.is_dir(), "another rank emptied the folder"


@pytest.mark.ranks(2, timeout=20)
def test_assertion_on_one_rank():
    value = dist.get_rank()
    assert value == 0, "only rank 1 is wrong"
    dist.barrier()


@pytest.mark.ranks(2, timeout=20)
def test_exception_instead_of_a_collective_on_one_rank():
    if dist.get_rank() == 1:
        print("about to raise")
        raise RuntimeError("raised while the others wait")
    dist.barrier()


@pytest.mark.ranks(2, timeout=2)
def test_hang_of_one_rank():
    if dist.get_rank() == 0:
        meet()


@pytest.mark.ranks(2, timeout=2)
def test_hang_of_all_ranks():
    while True:
        signal.pause()


@pytest.mark.ranks(2, timeout=20)
def test_segfault():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    meet()


@pytest.mark.ranks(2, timeout=20)
def test_abort_at_exit():
    if dist.get_rank() == 1:
        os.abort()
    meet()


@pytest.mark.ranks(2, timeout=20)
def test_exit_of_one_rank():
    if dist.get_rank() == 1:
        os._exit(0)
    meet()


@pytest.mark.ranks(2, timeout=20)
def test_sys_exit():
    sys.exit(0)


@pytest.mark.ranks(2, timeout=20)
def test_skip_on_one_rank():
    if dist.get_rank() == 1:
        pytest.skip("this rank does not feel like it")


@pytest.mark.ranks(2, timeout=20)
def test_skip_on_all_ranks():
    pytest.skip("nobody feels like it")


@pytest.mark.ranks(2, timeout=2)
def test_leaves_a_process_behind_and_hangs(tmp_path):
    if dist.get_rank() == 0:
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (tmp_path.parent / "orphan").write_text(str(orphan.pid))
    signal.pause()


@pytest.fixture
def broken():
    raise LookupError("the fixture is broken")


@pytest.mark.ranks(2, timeout=20)
def test_broken_fixture(broken):
    pass


@pytest.fixture
def broken_on_one_process():
    if os.environ.get("RANK") == "1":
        raise LookupError("the fixture is broken on one process")


@pytest.mark.ranks(2, timeout=20)
def test_fixture_that_breaks_on_one_process(broken_on_one_process):
    meet()


@pytest.mark.ranks(2)
def test_same_folder_on_all_ranks(tmp_path):
    (tmp_path / str(dist.get_rank())).write_text("")
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.ranks(2)
def test_fine_after():
    meet()


@pytest.mark.ranks(16)
def test_more_ranks_than_there_are():
    raise AssertionError("must not run")


def test_without_ranks():
    assert not dist.is_initialized()
