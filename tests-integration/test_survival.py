"""`docs/examples/train.py` under faults, in real runs under torchrun: the uninterrupted losses, or who failed and why.

A few run always; with `AM_SURVIVAL=folder` all of them do, on two layouts, and a soak of 500 steps; they leave there
what they measured, and `nox -s survival` makes `docs/reliability.md` of it. Which rank fails in which step is drawn
with a seed, and printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import socket
import statistics
import subprocess

import pytest

from am_testkit.torchrun import Torchrun

TRAIN = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "train.py"
FAULTY = pathlib.Path(__file__).parent / "survival" / "faulty_train.py"
SURVIVAL = os.environ.get("AM_SURVIVAL")

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)

STEPS = 8
SMALL = ["--batch", "4", "--microbatch", "1", "--seq-len", "32", "--steps", str(STEPS), "--save-every", "2"]
LAYOUTS = {
    "pp 2 x dp 2, ep 2": (4, ["--pp", "2", "--dp", "2", "--ep", "2", *SMALL]),
    "FSDP over 2": (2, ["--pp", "1", "--dp", "2", "--config", "llama", *SMALL]),
    "dp 2, ep 2": (2, ["--pp", "1", "--dp", "2", "--ep", "2", *SMALL]),
}
ALWAYS = "dp 2, ep 2"
EVERY = [name for name in LAYOUTS if name != ALWAYS] if SURVIVAL else [ALWAYS]
MORE = pytest.mark.skipif(not SURVIVAL, reason="runs in `nox -s survival`")
FLAT = 1.0  # MiB that a rank may grow in 100 steps
SEED = int(os.environ.get("AM_SEED", "7"))

# name -> the fault, who it may hit, and what the run must say; {rank} is who it hit, {step} when
FAULTS = {
    "SIGKILL in the middle of a step": (
        {"act": "kill"},
        r"rank {rank} does not answer, last seen in step {step}: killed, stopped or cut off",
    ),
    "SIGKILL while a checkpoint's tensors are written": (
        {"act": "kill", "file": "_0.distcp", "after": 2},
        r"rank {rank} does not answer, last seen in the checkpoint after step 6: killed, stopped or cut off",
    ),
    "SIGKILL while a checkpoint's manifest is written": (
        {"act": "kill", "file": "step-000006/manifest.json.new", "rank": 0},
        r"rank 0 does not answer, last seen in the checkpoint after step 6: killed, stopped or cut off",
    ),
    "SIGKILL while `latest` is replaced": (
        {"act": "kill", "file": "/latest.new", "rank": 0, "after": 2},
        r"rank 0 does not answer, last seen in the checkpoint after step 6: killed, stopped or cut off",
    ),
    "an exception": ({"act": "raise"}, r"rank {rank} failed in step {step}: RuntimeError: a layer that breaks"),
    "SIGSTOP: a rank that stops answering": (
        {"act": "stop"},
        r"rank {rank} does not answer, last seen in step {step}: killed, stopped or cut off",
    ),
    "a rank that waits for ever": (
        {"act": "hang"},
        r"nothing has moved for .* s, although every rank answers: .*rank {rank} is in step {step} \(.*wait\)",
    ),
    "a value that is not a number, once": (
        {"act": "nan"},
        r"rank \d+ failed in step {step}: RuntimeError: the gradient norm is nan; gradients that are not finite",
    ),
}
CHEAP = ["SIGKILL in the middle of a step", "SIGKILL while a checkpoint's tensors are written"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a layout's uninterrupted run, which is made once."""
    folders = {}

    def folder(layout):
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("whole")
            with train(layout, folders[layout]) as run:
                assert run.finish() == 0, run.output
            assert len(losses_of(folders[layout])) == STEPS
        return folders[layout]

    return folder


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("name", FAULTS if SURVIVAL else CHEAP)
def test_a_fault_is_named_and_the_restarted_run_gives_the_uninterrupted_losses(name, layout, whole, tmp_path):
    fault, words = FAULTS[name]
    fault = draw(name, layout) | fault
    patience = ["--timeout", "60"] if fault["act"] in ("stop", "hang") else []
    with train(layout, tmp_path, *patience, fault=fault, options=("--max-restarts=1",)) as run:
        assert run.finish() == 0, run.output
    struck = time_of(tmp_path / "fault")
    told, cause = said(run, words.format(**fault))
    again, start = said(run, r"^continues from .*step-00000[246]$")
    assert losses_of(tmp_path) == losses_of(whole(layout))
    assert [path.name for path in newest_first(tmp_path)] == ["step-000008", "step-000006"]
    record(name, layout, told=told - struck, seconds=again - struck, words=cause, end=f"restarts; {start}")


@pytest.mark.parametrize("layout", EVERY)
def test_a_launcher_told_to_stop_finishes_the_step_saves_and_can_be_resumed(layout, whole, tmp_path):
    fault = draw("SIGTERM of the launcher", layout) | {"act": "terminate"}
    with train(layout, tmp_path, "--save-every", 0, fault=fault) as run:
        assert run.finish() != 0, "a launcher that was stopped does not report success"
    ended = run.lines[-1][0]
    _, words = said(run, f"stopped by a signal after step {fault['step']}; --resume continues")
    assert len(losses_of(tmp_path)) == fault["step"]
    with train(layout, tmp_path, "--resume") as run:
        assert run.finish() == 0, run.output
    _, start = said(run, r"^continues from .*$")
    assert losses_of(tmp_path) == losses_of(whole(layout))
    seconds = ended - time_of(tmp_path / "fault")
    record("SIGTERM of the launcher", layout, seconds=seconds, words=words, end=f"`--resume` {start}")


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("how", ["truncated", "one byte changed", "no manifest"] if SURVIVAL else ["truncated"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(how, layout, whole, tmp_path):
    folder = shutil.copytree(whole(layout), tmp_path / "copy")
    words = damage(folder / "step-000008", how)
    with train(layout, folder, "--resume") as run:
        assert run.finish() == 0, run.output
    _, cause = said(run, f"damaged checkpoint passed over: .*{words}")
    _, start = said(run, r"^continues from .*step-000006$")
    assert losses_of(folder) == losses_of(whole(layout))
    record(f"a checkpoint file: {how}", layout, seconds=run.lines[-1][0] - run.started, words=cause, end=start)


@MORE
@pytest.mark.parametrize("layout", EVERY)
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_on_every_rank(layout, whole, tmp_path):
    folder = shutil.copytree(whole(layout), tmp_path / "copy")
    words = [damage(folder / name, "truncated") for name in ("step-000008", "step-000006")]
    with train(layout, folder, "--resume") as run:
        assert run.finish() != 0
    _, cause = said(run, f"^rank . failed in the start: ValueError: every checkpoint .*{words[0]}; .*{words[1]}")
    ranks = set(re.findall(r"^rank (\d) (?:failed|ends) in the start: .*every checkpoint", run.output, re.MULTILINE))
    assert len(ranks) == LAYOUTS[layout][0]
    seconds = run.lines[-1][0] - run.started
    record("every checkpoint: truncated", layout, seconds=seconds, words=cause, end="refused")


@MORE
@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("how", ["a small tmpfs", "a limit on the size of files"])
def test_a_full_disk_ends_the_run_with_the_last_checkpoints_whole(how, layout, whole, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    size = sum(file.stat().st_size for file in (whole(layout) / "step-000008").iterdir())
    fault = draw(how, layout) | {"act": "limit", "step": 5} if how.startswith("a limit") else None
    with contextlib.nullcontext() if fault else tmpfs(folder, int(2.5 * size)) as grow:
        with train(layout, folder, fault=fault) as run:
            assert run.finish() != 0, run.output
        _, cause = said(run, r"^rank \d failed in the checkpoint after step 6: .*step-000006 could not be written: .*")
        assert [path.name for path in newest_first(folder)] == ["step-000004", "step-000002"]
        assert not (folder / "step-000006").exists(), "what could not be written leaves room again"
        if grow:
            grow()
        with train(layout, folder, "--resume") as run_again:
            assert run_again.finish() == 0, run_again.output
        _, start = said(run_again, r"^continues from .*step-000004$")
        assert losses_of(folder) == losses_of(whole(layout))
    if fault:
        assert f"rank {fault['rank']}: " in cause
    began, _ = said(run, r"^step +6 ")
    record(f"a full disk: {how}", layout, seconds=run.lines[-1][0] - began, words=cause, end=f"`--resume` {start}")


@MORE
@pytest.mark.parametrize("layout", EVERY)
def test_gradients_that_are_never_finite_end_the_run_and_are_applied_nowhere(layout, whole, tmp_path):
    fault = draw("not a number", layout) | {"act": "nan"}
    with train(layout, tmp_path, fault=fault) as run:
        assert run.finish() != 0
    struck = time_of(tmp_path / "fault")
    told, cause = said(run, rf"^rank \d failed in step {fault['step']}: RuntimeError: .*on this rank: .*\.weight")
    assert len(losses_of(tmp_path)) == fault["step"] - 1
    with train(layout, tmp_path, "--resume") as run_again:
        assert run_again.finish() == 0, run_again.output
    _, start = said(run_again, r"^continues from .*$")
    assert losses_of(tmp_path) == losses_of(whole(layout))
    seconds = run.lines[-1][0] - struck
    record(
        "gradients that are NaN", layout, told=told - struck, seconds=seconds, words=cause, end=f"`--resume` {start}"
    )


def test_ranks_started_with_other_arguments_seeds_or_texts_are_refused_with_who_has_what(tmp_path):
    """Two launchers, as on two machines: each has its own command line and its own file of the same name."""
    for node, text in enumerate(("one text " * 99, "another text " * 99)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "text.txt").write_text(text)
    own = (["--seed", "0", "--lr", "0.1"], ["--seed", "7", "--lr", "0.2"])
    words = ["--pp", "1", "--dp", "2", "--config", "llama", *SMALL, "--text", "text.txt", "--out", tmp_path / "out"]
    with contextlib.ExitStack() as both:
        runs = [
            both.enter_context(Torchrun(1, TRAIN, *words, *own[n], options=nodes, cwd=tmp_path / str(n)))
            for nodes in [two_nodes()]
            for n in range(2)
        ]
        assert all(run.finish() != 0 for run in runs)
    for run in runs:
        _, cause = said(run, "ValueError: the ranks were started differently: .*")
        for name in ("--lr", "--seed", "the digest of --text"):
            assert re.search(rf"{name} is \S+ on rank \d, \S+ on rank \d", cause), cause
    assert not (tmp_path / "out").exists()
    seconds = max(run.lines[-1][0] for run in runs) - min(run.started for run in runs)
    record(
        "other arguments, another seed, another text on one rank",
        "FSDP over 2",
        seconds=seconds,
        words=cause,
        end="refused",
    )


@MORE
def test_two_nodes_restart_together_when_a_rank_of_one_is_killed(whole, tmp_path):
    layout, name = "FSDP over 2", "SIGKILL of a rank on one of two nodes"
    fault = draw(name, layout) | {"act": "kill", "mark": str(tmp_path / "fault")}
    words = [FAULTY, *LAYOUTS[layout][1], "--out", tmp_path]
    with contextlib.ExitStack() as both:
        options = (*two_nodes(), "--max-restarts=2")
        environment = {"AM_FAULT": json.dumps(fault)}
        runs = [both.enter_context(Torchrun(1, *words, options=options, environment=environment)) for _ in range(2)]
        codes = [run.finish() for run in runs]
    everything = "".join(run.output for run in runs)
    assert codes == [0, 0], everything
    first = next(run for run in runs if "continues from" in run.output)
    cause = re.search(rf"rank {fault['rank']} does not answer, last seen in step {fault['step']}: killed.*", everything)
    assert cause, everything
    again, start = said(first, r"^continues from .*$")
    assert losses_of(tmp_path) == losses_of(whole(layout))
    record(name, layout, seconds=again - time_of(tmp_path / "fault"), words=cause[0], end=f"restarts; {start}")


@MORE
def test_a_run_that_starts_afresh_keeps_what_an_earlier_one_left(whole, tmp_path):
    folder = shutil.copytree(whole(EVERY[0]), tmp_path / "copy")
    with train(EVERY[0], folder, "--steps", "1", "--lr", "0.1") as run:
        assert run.finish() == 0, run.output
    assert [path.name for path in newest_first(folder)] == ["step-000001"]
    assert [path.name for path in newest_first(folder / "before")] == ["step-000008", "step-000006"]
    assert losses_of(folder / "before") == losses_of(whole(EVERY[0]))
    assert len(losses_of(folder)) == 1


@MORE
@pytest.mark.parametrize("layout", EVERY)
def test_five_hundred_steps_leave_the_memory_of_each_rank_as_it_was(layout, tmp_path):
    """Resident memory after each step, checkpoints included; the first hundred steps are the warm-up."""
    memory = tmp_path / "memory"
    memory.mkdir()
    processes, words = LAYOUTS[layout]
    words = [*words, "--steps", 500, "--save-every", 50, "--out", tmp_path / "out"]
    with Torchrun(processes, FAULTY, *words, environment={"AM_RSS": str(memory)}) as run:
        assert run.finish(1800) == 0, run.output
    ranks = []
    for rank in range(processes):
        lines = [line.split() for line in (memory / f"rank-{rank}.txt").read_text().splitlines()]
        samples = [int(size) / 2**20 for _, size in lines][:500]  # MiB
        assert len(samples) == 500
        settled = statistics.linear_regression(range(100, 500), samples[100:])
        ranks.append({"MiB": samples, "slope": settled.slope * 100, "grown": samples[-1] - samples[100]})
    record("soak", layout, seconds=run.lines[-1][0] - run.started, ranks=ranks)
    for rank in ranks:
        assert abs(rank["slope"]) < FLAT, f"MiB per 100 steps: {[r['slope'] for r in ranks]}"


def train(layout, folder, *arguments, fault=None, options=()):
    processes, words = LAYOUTS[layout]
    words = (FAULTY if fault else TRAIN, *words, "--timeout", 120, "--out", folder, *arguments)
    environment = {}
    if fault and fault["act"] == "stop":
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "5"  # how long torchrun asks a stopped rank to end
    if fault:
        environment["AM_FAULT"] = json.dumps(fault | {"mark": str(folder / "fault")})
    return Torchrun(processes, *words, options=options, environment=environment)


def draw(name, layout):
    """A rank, a step after the first checkpoint and a file of that rank's, the same for a seed."""
    chance = random.Random(f"{SEED} {name} {layout}")  # noqa: S311
    rank, step = chance.randrange(LAYOUTS[layout][0]), chance.randrange(3, STEPS) + 1
    print(f"seed {SEED}: rank {rank}, step {step}")
    return {"rank": rank, "step": step}


def damage(checkpoint, how):
    """Damage the largest file, or the manifest; returns what must be said of it, as a pattern."""
    path = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
    if how == "no manifest":
        (checkpoint / "manifest.json").unlink()
        return f"{checkpoint.name}/manifest.json is missing"
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return rf"{checkpoint.name}/{path.name} has [\d,]+ bytes instead of [\d,]+"
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{checkpoint.name}/{path.name} holds other bytes than were written"


@contextlib.contextmanager
def tmpfs(folder, size):
    """A file system of this many bytes; yields what doubles it. Skips where nothing may be mounted."""
    if subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield lambda: subprocess.run(["/bin/mount", "-o", f"remount,size={2 * size}", folder], check=True)
    finally:
        subprocess.run(["/bin/umount", folder], check=True)


def two_nodes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=survival")
    return ("--nnodes=2", *meet, "--local-addr=127.0.0.1")


def newest_first(folder):
    """The complete checkpoints, and that `latest` names the newest."""
    found = sorted((path.parent for path in folder.glob("step-*/manifest.json")), reverse=True)
    assert (folder / "latest").read_text() == found[0].name
    return found


def losses_of(folder):
    return (folder / "losses.txt").read_text().split()


def time_of(mark):
    return float(mark.read_text())


def said(run, pattern):
    """When a line gave this cause, and its words; fails when none did."""
    found = [(when, re.search(pattern, text)) for when, text in run.lines]
    times = [(when, match[0]) for when, match in found if match]
    assert times, f"nothing says {pattern!r}\n{run.output}"
    return times[0]


def record(fault, layout, **measured):
    """Leave what was measured for the table."""
    if not SURVIVAL:
        return
    name = re.sub(r"\W+", "-", f"{fault} {layout}")
    (pathlib.Path(SURVIVAL) / f"{name}.json").write_text(json.dumps({"fault": fault, "layout": layout, **measured}))
