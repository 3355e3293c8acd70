"""The process group's end, in real processes that get real signals."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch.distributed as dist

from am_fsdp import _destroy_dist_connection, stop_on_signal
from am_fsdp.process_group import _held_back

TRAIN = """
    import pathlib, sys, time
    import torch, torch.distributed as dist
    from am_fsdp import stop_on_signal

    folder, rank, store = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))

    def save(step):  # slow, so that a second signal meets it half done
        part = folder / f"part-{rank}"
        part.write_text("half")
        (folder / f"saving-{rank}").touch()
        time.sleep(SLOW)
        part.write_text(str(step))
        part.rename(folder / f"checkpoint-{rank}")

    with stop_on_signal() as stop:
        for step in range(100_000):
            dist.all_reduce(torch.ones(1))
            (folder / f"running-{rank}").touch()
            if stop.requested():
                save(step)
                break
        print("left", stop.signal, flush=True)
    print("never reached", flush=True)
"""


def start(folder, slow=0.0):
    script = folder / "train.py"
    script.write_text(textwrap.dedent(TRAIN).replace("SLOW", str(slow)))
    store = folder / "store"
    command = [sys.executable, str(script), str(folder)]
    return [
        subprocess.Popen([*command, str(rank), str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def wait_for(path: pathlib.Path, processes) -> None:
    while not path.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_a_checkpoint(tmp_path, number):
    processes = start(tmp_path)
    wait_for(tmp_path / "running-0", processes)
    processes[1].send_signal(number)
    said = [process.communicate(timeout=60) for process in processes]
    steps = [(tmp_path / f"checkpoint-{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    assert [out for out, _ in said] == [f"left {int(number)}\n"] * 2
    for process, (_, errors) in zip(processes, said, strict=True):
        if number == signal.SIGTERM:
            assert process.returncode == -signal.SIGTERM  # ended by the signal, as its launcher expects
        else:
            assert process.returncode == -signal.SIGINT
            assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_checkpoint_that_is_being_written_is_finished(tmp_path):
    processes = start(tmp_path, slow=0.5)
    wait_for(tmp_path / "running-0", processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=60)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-1"}
    assert all(path.read_text() != "half" for path in tmp_path.glob("checkpoint-*"))
    assert not list(tmp_path.glob("part-*"))


def test_a_second_signal_acts_at_once(tmp_path):
    processes = start(tmp_path, slow=60)
    wait_for(tmp_path / "running-0", processes)
    processes[0].send_signal(signal.SIGTERM)
    for rank in range(2):
        wait_for(tmp_path / f"saving-{rank}", processes)
    processes[0].send_signal(signal.SIGTERM)
    processes[0].communicate(timeout=20)
    processes[1].kill()
    assert processes[0].returncode == -signal.SIGTERM
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_first_signal_of_a_rank_that_stops_for_a_peer_changes_nothing(tmp_path):
    processes = start(tmp_path, slow=0.5)
    wait_for(tmp_path / "running-0", processes)
    processes[0].send_signal(signal.SIGTERM)
    wait_for(tmp_path / "saving-1", processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGTERM
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-1"}


@pytest.mark.ranks(2)
def test_the_group_is_left_once_and_again_and_from_another_thread():
    thread = threading.Thread(target=_destroy_dist_connection)
    thread.start()
    thread.join()
    assert not dist.is_initialized()
    _destroy_dist_connection()


def test_handlers_are_as_before_after_leaving_also_by_an_exception():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    during = []

    def fail():
        with stop_on_signal():
            during.append(signal.getsignal(signal.SIGTERM))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during[0] not in before
    _destroy_dist_connection()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_that_is_held_back_takes_effect_afterwards():
    done = []

    def interrupted():
        with _held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["all of it"]


def test_signals_are_refused_off_the_main_thread():
    errors = []

    def run():
        try:
            with stop_on_signal():
                pass
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == ["stop_on_signal works in the main thread alone, where Python handles signals"]
