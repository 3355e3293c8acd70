"""A suite of deliberately bad tests, in both modes: each ends as that test failed, and the rest runs."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest

from am_testkit.forked import run_forked

BAD = pathlib.Path(__file__).parents[1] / "bad_suite"
MODES = ["forked", "lockstep", "lockstep on three"]


@pytest.fixture(scope="module", params=MODES)
def run(request, tmp_path_factory):
    """Run the bad suite once per mode: what it printed, its junit by test name, its exit code, how long it took."""
    folder = tmp_path_factory.mktemp("run")
    report = folder / "junit.xml"
    command = ["-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", str(BAD), f"--junitxml={report}"]
    command += [f"--basetemp={folder / 'tmp'}", "--max-ranks=4", "-c", os.devnull, f"--rootdir={BAD}"]
    if request.param == "forked":
        command.append("--continue-on-collection-errors")
    else:
        processes = "2" if request.param == "lockstep" else "3"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, *command]
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=150, check=False
    )
    cases = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        cases[case.get("name") or case.get("classname")] = case
    return request.param, done.stdout, cases, done.returncode, time.monotonic() - began, folder


FAILURES = {
    "test_assertion_on_one_rank": ["rank 1 of 2 failed", "only rank 1 is wrong", "assert value == 0", "rank 0 "],
    "test_exception_instead_of_a_collective_on_one_rank": [
        "rank 1 of 2 failed",
        "raised while the others wait",
        "about to raise",
        "rank 0 ",
    ],
    "test_hang_of_one_rank": ["rank 0 of 2 hung", "still running after 2 seconds", "in meet", "rank 1 passed"],
    "test_hang_of_all_ranks": ["rank 0 of 2 hung", "rank 1 of 2 hung", "in test_hang_of_all_ranks"],
    "test_segfault": ["rank 1 of 2 crashed", "SIGSEGV", "in test_segfault"],
    "test_abort_at_exit": ["rank 1 of 2 crashed", "SIGABRT"],
    "test_exit_of_one_rank": ["rank 1 of 2 crashed", "exited with code 0 before the test was over"],
    "test_sys_exit": ["of 2 failed", "SystemExit"],
    "test_skip_on_one_rank": ["rank 1 skipped (this rank does not feel like it), but rank 0 passed"],
    "test_leaves_a_process_behind_and_hangs": ["hung"],
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_goes_wrong_on_a_rank_fails_that_test_and_says_why(run, name):
    _, _, cases, _, _, _ = run
    failure = cases[name].find("failure")
    assert failure is not None, f"{name} was not reported as failed"
    for words in FAILURES[name]:
        assert words in failure.text, f"{words!r} is not in:\n{failure.text}"


FINE = (
    *("test_fine_before", "test_fine_after", "test_without_ranks"),
    *("test_ranks_ask_for_a_folder_before_their_parent_did", "test_same_folder_on_all_ranks"),
)


@pytest.mark.parametrize("name", [*FINE, "test_in_the_next_module"])
def test_the_tests_around_bad_ones_pass(run, name):
    case = run[2][name]
    assert all(case.find(kind) is None for kind in ("failure", "error", "skipped"))


def test_skips_have_their_reason(run):
    mode, _, cases, _, _, _ = run
    assert "nobody feels like it" in cases["test_skip_on_all_ranks"].find("skipped").get("message")
    here = {"forked": 4, "lockstep": 2, "lockstep on three": 3}[mode]
    assert f"needs 16 ranks, {here} here" in cases["test_more_ranks_than_there_are"].find("skipped").get("message")


def test_fixtures_that_break_are_errors_of_their_test(run):
    mode, _, cases, _, _, _ = run
    assert "the fixture is broken" in cases["test_broken_fixture"].find("error").text
    one_sided = cases["test_fixture_that_breaks_on_one_process"]
    if mode == "forked":
        assert one_sided.find("failure") is None
    else:
        assert "rank 1 of 2 failed" in one_sided.find("failure").text
        assert "broken on one process" in one_sided.find("failure").text


def test_a_module_that_one_process_cannot_import_is_an_error_by_its_name(run):
    _, _, cases, _, _, _ = run
    errors = [case.find("error") for name, case in cases.items() if "fixture" not in name]
    (error,) = [error for error in errors if error is not None]
    assert "this process cannot import the module" in error.text
    assert "test_never_runs" not in cases


def test_the_launch_fails_and_counts_right(run):
    mode, output, _, code, _, _ = run
    assert code == 1
    failed = len(FAILURES) + (mode != "forked")
    passed = 6 + (mode == "forked")
    assert f"{failed} failed, {passed} passed, 2 skipped, 2 errors" in re.sub(r"\d+ warnings?, ", "", output)
    assert output.count("test session starts") == 1, "one rank reports"


def test_it_ends_in_bounded_time_and_nothing_outlives_it(run):
    _, _, _, _, seconds, folder = run
    assert seconds < 60
    for note in folder.rglob("orphan"):
        status = pathlib.Path(f"/proc/{note.read_text()}/status")
        assert not status.exists() or "State:\tZ" in status.read_text()


def test_tests_over_ranks_come_before_those_of_the_process_itself(tmp_path):
    lines = ["import pytest", "def test_a(): pass", "@pytest.mark.ranks(1)", "def test_b(): pass", "def test_c(): pass"]
    (tmp_path / "test_order.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", os.devnull, f"--rootdir={tmp_path}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    assert re.findall(r"::test_(\w)", done.stdout) == ["b", "a", "c"]


def test_a_test_over_ranks_leaves_no_open_file_behind():
    run_forked(lambda: None, str, 2, 60.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert run_forked(lambda: None, str, 2, 60.0).status == "passed"
    assert len(os.listdir("/proc/self/fd")) == before
