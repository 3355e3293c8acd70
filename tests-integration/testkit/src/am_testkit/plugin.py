"""`@pytest.mark.ranks(n, timeout=60)`: the body of a test is what each of n ranks runs.

Plain pytest forks the ranks; under torchrun they are torchrun's processes, in lockstep. In both modes one failing rank
fails the test by name, within its timeout, and the tests after it run.
"""

from __future__ import annotations

import os

# One thread per rank, decided before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The parent of forked ranks must not start CUDA when it asks whether there is any.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
from _pytest.runner import runtestprotocol

from am_testkit.forked import run_forked
from am_testkit.verdict import Outcome, Verdict


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--max-ranks", type=int, default=8, help="skip tests that ask for more ranks (plain pytest)")
    parser.addoption("--min-ranks", type=int, default=0, help="leave out tests that ask for fewer ranks, or for none")
    parser.addoption("--first-cases", action="store_true", help="of a test with parameters, run the first ones only")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(n, timeout=60): run the body on n ranks of a default process group")
    under_torchrun = os.environ.get("TORCHELASTIC_RUN_ID") and "PYTEST_XDIST_WORKER" not in os.environ
    if under_torchrun:
        from am_testkit.lockstep import Lockstep

        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise pytest.UsageError("torchrun serves no store; start it with --standalone or --rdzv-backend=c10d")
        lockstep = Lockstep()
        config.pluginmanager.register(LockstepSession(config, lockstep), "am_testkit_lockstep")


@pytest.fixture(scope="session")
def tmp_path_factory(tmp_path_factory):
    """Its folder is made before ranks are forked: a worker of xdist has none yet, and each rank would make it."""
    tmp_path_factory.getbasetemp()
    return tmp_path_factory


@pytest.fixture
def tmp_path(tmp_path, request):
    """The same folder on every rank."""
    session = request.config.pluginmanager.get_plugin("am_testkit_lockstep")
    return session.same_path(request.node, tmp_path) if session else tmp_path


def asked(item: pytest.Item) -> tuple[int, float] | None:
    """How many ranks a test asks for, and its timeout."""
    marker = item.get_closest_marker("ranks")
    if marker is None:
        return None

    def read(n: int, timeout: float = 60) -> tuple[int, float]:
        return n, timeout

    try:
        return read(*marker.args, **marker.kwargs)
    except TypeError as error:
        raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.ranks(n, timeout=60): {error}") from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    least = config.getoption("--min-ranks")
    left_out = [item for item in items if (asked(item) or (0, 0))[0] < least]
    if config.getoption("--first-cases"):
        firsts: dict[str, pytest.Item] = {}
        left_out += [item for item in items if firsts.setdefault(item.nodeid.partition("[")[0], item) is not item]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # A torch with CUDA in it starts threads at the first backward of a process, and CUDA itself where a test uses a
    # GPU; ranks that are forked afterwards can do neither. So whatever runs in this process comes last.
    items.sort(key=lambda item: asked(item) is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What every rank needs is imported once, before the first fork."""
    if any(asked(item) for item in session.items):
        import torch.distributed.device_mesh
        import torch.distributed.fsdp
        import torch.distributed.tensor.parallel  # noqa: F401


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = asked(item)
    if wanted is None:
        return
    session = item.config.pluginmanager.get_plugin("am_testkit_lockstep")
    here = session.lockstep.world if session else item.config.getoption("--max-ranks")
    if wanted[0] > here:
        pytest.skip(f"needs {wanted[0]} ranks, {here} here")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    wanted = asked(pyfuncitem)
    if wanted is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    session = pyfuncitem.config.pluginmanager.get_plugin("am_testkit_lockstep")
    run = session.run if session else lambda item, *rest: run_forked(*rest)
    raise_verdict(run(pyfuncitem, lambda: pyfuncitem.obj(**arguments), _renderer(pyfuncitem), *wanted))
    return True


def raise_verdict(verdict: Verdict) -> None:
    if verdict.status == "skipped":
        pytest.skip(verdict.text)
    if verdict.status == "failed":
        pytest.fail(verdict.text, pytrace=False)


def _renderer(item: pytest.Item):
    def render(error: BaseException) -> str:
        return str(item.repr_failure(pytest.ExceptionInfo.from_exception(error)))

    return render


class LockstepSession:
    """pytest as one of the controllers under torchrun. Only rank 0 prints, writes junit and counts."""

    def __init__(self, config: pytest.Config, lockstep) -> None:
        self.lockstep = lockstep
        self.errors: dict[str, str] = {}
        self.number = -1
        self.reported = False
        config.option.continue_on_collection_errors = True
        if lockstep.rank:
            config.option.xmlpath = None
            config.option.basetemp = None  # pytest empties and makes that folder: rank 0 alone may

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.lockstep.rank:
            session.config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = str(report.longrepr)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Keep the tests that every rank has, in rank 0's order; what only some have is an error with its cause."""
        mine = {"items": [item.nodeid for item in items], "errors": self.errors}
        everyone = self.lockstep.all_say("collected", mine)
        common = set(everyone[0]["items"]).intersection(*(each["items"] for each in everyone))
        order = {nodeid: place for place, nodeid in enumerate(everyone[0]["items"])}
        dropped = {i for each in everyone for i in each["items"]} - common
        items[:] = sorted((item for item in items if item.nodeid in common), key=lambda item: order[item.nodeid])
        if self.lockstep.rank:
            return
        for rank, each in enumerate(everyone[1:], 1):
            for nodeid, text in each["errors"].items():
                dropped = {d for d in dropped if not d.startswith(nodeid)}
                if nodeid not in self.errors:
                    self.errors[nodeid] = text
                    self._collection_error(session, nodeid, f"rank {rank} could not collect it:\n\n{text}")
        unexplained = {d for d in dropped if not any(d.startswith(nodeid) for nodeid in self.errors)}
        for nodeid in sorted(unexplained):
            have = [rank for rank, each in enumerate(everyone) if nodeid in each["items"]]
            self._collection_error(session, nodeid, f"only the ranks {have} of {self.lockstep.world} collected it")

    def _collection_error(self, session: pytest.Session, nodeid: str, text: str) -> None:
        report = pytest.CollectReport(nodeid, "failed", text, [])
        session.config.hook.pytest_collectreport(report=report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        self.number += 1
        wanted = asked(item)
        if not self._takes_part(wanted):
            return True
        self.reported = False
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        # What is torn down after a test is what this rank's next one does not use, and that may be in another module.
        later = (each for each in item.session.items[self.number + 1 :] if self._takes_part(asked(each)))
        reports = runtestprotocol(item, log=False, nextitem=next(later, None))
        if wanted is not None and wanted[0] <= self.lockstep.world:
            self._agree_on(reports, *wanted)
        if self.lockstep.rank == 0:
            for report in reports:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _takes_part(self, wanted: tuple[int, float] | None) -> bool:
        """Rank 0 alone runs what asks for no ranks, and reports the skip of what asks for more than there are."""
        ranks = wanted[0] if wanted else 1
        return self.lockstep.rank < ranks if ranks <= self.lockstep.world else self.lockstep.rank == 0

    def run(self, item: pytest.Item, body, render, ranks: int, timeout: float) -> Verdict:
        self.reported = True
        return self.lockstep.run(f"test{self.number}", body, render, ranks, timeout)

    def _agree_on(self, reports: list[pytest.TestReport], ranks: int, timeout: float) -> None:
        """Outcomes from before and after the body: a fixture or a skip that differs between ranks fails the test."""
        setup, last = reports[0], reports[-1]
        if not self.reported:  # the body did not run here
            status = "skipped" if setup.skipped else "failed"
            reason = str(setup.longrepr[2]) if isinstance(setup.longrepr, tuple) else str(setup.longrepr)
            outcome = Outcome(self.lockstep.rank, status, reason, reason.splitlines()[-1] if reason else "")
            verdict = self.lockstep.judge(f"test{self.number}", outcome, ranks, timeout)
            if verdict.status == "failed" and setup.skipped:
                setup.outcome, setup.longrepr = "failed", verdict.text
        ended = "" if last.when != "teardown" or last.passed else str(last.longrepr)
        key = f"test{self.number}/teardown"
        self.lockstep.say(f"{key}/{self.lockstep.rank}", ended)
        if self.lockstep.rank == 0:
            others = [(r, self.lockstep.hear(f"{key}/{r}", timeout + 60)) for r in range(1, ranks)]
            bad = [f"rank {rank} failed in teardown:\n\n{text}" for rank, text in others if text]
            if bad and last.passed:
                last.outcome, last.longrepr = "failed", "\n".join(bad)

    def same_path(self, item: pytest.Item, path):
        """Rank 0's folder for everyone."""
        key = f"test{self.number}/path"
        if self.lockstep.rank == 0:
            self.lockstep.say(key, str(path))
        return type(path)(self.lockstep.hear_of(key, f"test{self.number}/0", 120))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.lockstep.rank == 0:
            self.lockstep.say("exit", int(exitstatus))
        else:
            self.lockstep.hear("exit", 3600)
            session.exitstatus = pytest.ExitCode.OK  # the launch fails by rank 0's code, after all is printed

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """A rank that is still needed by rank 0 must not be gone: rank 0 says when all is printed."""
        if self.lockstep.rank == 0:
            self.lockstep.say("done", True)
        else:
            self.lockstep.hear("done", 600)
