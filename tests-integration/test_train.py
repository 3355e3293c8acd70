"""`docs/examples/train.py` as a user runs it: exact, resumable, ended by a lost rank, clear about bad degrees."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

TRAIN = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "train.py"

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)

LAYOUTS = {
    "pp2": ["--pp", "2", "--dp", "1", "--ep", "1"],
    "tp2": ["--pp", "1", "--dp", "1", "--tp", "2"],
    "tp2-sp": ["--pp", "1", "--dp", "1", "--tp", "2", "--sequence-parallel"],
    "dp2": ["--pp", "1", "--dp", "2", "--ep", "1"],
    "pp2-tp2": ["--pp", "2", "--dp", "1", "--tp", "2"],
    "pp2-dp2": ["--pp", "2", "--dp", "2", "--ep", "1"],
    "dp2-tp2": ["--pp", "1", "--dp", "2", "--tp", "2", "--sequence-parallel"],
    "pp2-dp2-tp2": ["--pp", "2", "--dp", "2", "--tp", "2"],
    "ep2-dp2": ["--pp", "1", "--dp", "2", "--ep", "2"],
    "pp2-ep2-dp2": ["--pp", "2", "--dp", "2", "--ep", "2"],
}


def launch(processes, *arguments, **settings):
    """Start torchrun with nothing of the surrounding run's rendezvous in its environment."""
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(TRAIN), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **settings,
    )


def finish(process, timeout=240):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def size(arguments):
    degree = dict(zip(arguments[::2], arguments[1::2], strict=False))
    return int(degree.get("--pp", 1)) * int(degree.get("--dp", 1)) * int(degree.get("--tp", 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_agree_with_one_process(layout, tmp_path):
    arguments = LAYOUTS[layout]
    code, output = finish(launch(size(arguments), *arguments, "--steps", 20, "--check", "--out", tmp_path))
    assert code == 0, output
    assert "check: the run agrees with one process" in output
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    if "--pp 2" in " ".join(arguments):
        assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_a_check_that_should_fail_fails(tmp_path):
    code, output = finish(launch(2, *LAYOUTS["pp2"], "--steps", 3, "--check", "--tolerance", 0, "--out", tmp_path))
    assert code != 0
    assert "PARTS from one process" in output


def test_a_lost_rank_ends_the_run_and_resuming_gives_the_uninterrupted_losses_bit_for_bit(tmp_path):
    layout = LAYOUTS["pp2-ep2-dp2"]
    short = ["--save-every", 4, "--batch", 8, "--microbatch", 1, "--seq-len", 64]
    code, output = finish(launch(4, *layout, *short, "--steps", 12, "--out", tmp_path / "whole"))
    assert code == 0, output

    process = launch(4, *layout, *short, "--steps", 100_000, "--out", tmp_path / "cut")
    pointer = tmp_path / "cut" / "latest"
    deadline = time.monotonic() + 120
    while not pointer.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint was written in two minutes"
        process.stdout.readline()
    os.kill(rank_pid(process.pid), signal.SIGKILL)
    lost = time.monotonic()
    code, _ = finish(process, timeout=60)
    assert code != 0
    assert time.monotonic() - lost < 60

    assert pointer.read_text() == "step-000004"
    code, output = finish(launch(4, *layout, *short, "--steps", 12, "--resume", "--out", tmp_path / "cut"))
    assert code == 0, output
    whole = (tmp_path / "whole" / "losses.txt").read_text().split()
    assert (tmp_path / "cut" / "losses.txt").read_text().split() == whole[4:]


def rank_pid(launcher):
    """The process of the highest rank that torchrun started."""
    children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for pid in children:
        variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks |= {int(v[5:]): int(pid) for v in variables if v.startswith("RANK=")}
    return ranks[max(ranks)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pp", 2, "--dp", 2], r"--pp 2 x --dp 2 x --tp 1 is 4 ranks, but 2 were started"),
        (["--pp", 1, "--dp", 2, "--ep", 3], r"--ep 3 must divide --dp 2"),
        (["--config", "llama", "--pp", 1, "--dp", 2, "--ep", 2], r"llama has no experts"),
        (["--pp", 2, "--dp", 1, "--batch", 6, "--microbatch", 4], r"--microbatch 4 must divide the 6 sequences"),
        (["--pp", 1, "--dp", 2, "--batch", 7], r"--batch 7 must be a multiple of --dp 2: 8"),
        (["--pp", 2, "--dp", 1, "--sequence-parallel"], r"--sequence-parallel needs --tp"),
        (["--pp", 2, "--dp", 1, "--config", "no_such_model"], r"neither a folder nor a transformers model type"),
        (["--pp", 2, "--dp", 1, "--resume"], r"holds no complete checkpoint"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_on_every_rank_before_any_collective(arguments, words, tmp_path):
    code, output = finish(launch(2, *arguments, "--out", tmp_path / "nothing"))
    assert code != 0
    assert len(re.findall(rf"ValueError: .*{words}", output)) >= 1, output
    assert "init_process_group" not in output
