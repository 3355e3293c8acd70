"""Everything a maintainer runs, from nothing but Python and pip: `nox -l` lists it, bare `nox` runs what CI runs.

Local packages are installed editable, siblings in the same command, so that a sibling outside its declared range
fails the resolve. `.ci/constraints.txt` pins what the sessions install, not what users install; point AM_CONSTRAINTS at
another file, or at nothing, to try other versions.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import nox

ROOT = pathlib.Path(__file__).parent
PACKAGES = ("am-tp-styles", "am-tp-plans", "am-fsdp", "am-moe", "am-pipeline")
TESTKIT = "tests-integration/testkit"
JUNIT = ROOT / "build" / "junit"
TOGETHER = ROOT / ".nox" / "together" / ("Scripts" if sys.platform == "win32" else "bin")

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "integration", "build", "wheels"]


@nox.session
def together(session: nox.Session) -> None:
    """The one environment of `train`, `integration` and `types`: all packages and transformers."""
    test_tools = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "transformers>=5.17", "pyrefly"]
    local = editable(*(f"packages/{p}" for p in PACKAGES), TESTKIT)
    install(session, *local, *test_tools, "matplotlib>=3.8", "tqdm", "numpy")


@nox.session(venv_backend="none", requires=["together"])
def train(session: nox.Session) -> None:
    """The main job: `nox -s train -- --pp 2 --dp 2 --ep 2 --check`; as many processes as the degrees say."""
    torchrun(session, _processes(session.posargs), "docs/examples/train.py", *session.posargs)


@nox.session
@nox.parametrize("package", [*PACKAGES, "testkit"])
def tests(session: nox.Session, package: str) -> None:
    """A package's own suite, in an environment with that package, what it declares, and its test tools."""
    if package == "testkit":
        install(session, "-e", TESTKIT)
        folder = f"{TESTKIT}/tests"
    else:
        local = [f"packages/{name}" for name in closure(package)]
        group = project(package)["dependency-groups"]["test"]
        third_party = [r for r in group if r != "am-testkit"]
        install(session, *editable(*local, TESTKIT), *third_party)
        folder = f"packages/{package}/tests"
    workers = ("-n", "2") if (os.cpu_count() or 1) > 4 and "-n" not in session.posargs else ()
    pytest(session, f"tests-{package}", folder, *workers, *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
@nox.parametrize("ranks", [2, 4, 8])
def integration(session: nox.Session, ranks: int) -> None:
    """The packages together, every rank of torchrun in lockstep; NCCL where there are that many GPUs, else gloo."""
    JUNIT.mkdir(parents=True, exist_ok=True)
    report = f"--junitxml={JUNIT}/integration-{ranks}.xml"
    torchrun(session, ranks, "-m", "pytest", "tests-integration", f"--ignore={TESTKIT}", report, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, undeclared imports, and who may import whom."""
    install(session, "ruff", "deptry", "pytest")
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            run(session, "deptry", "src", "--known-first-party", package.replace("-", "_"))
    pytest(session, "lint", "tests-integration/packaging/test_sibling_graph.py", "-p", "no:cacheprovider")


@nox.session(venv_backend="none", requires=["together"])
def types(session: nox.Session) -> None:
    """Static types of the five packages."""
    run(
        session,
        "pyrefly",
        "check",
        "--python-interpreter-path",
        str(TOGETHER / "python"),
        *(f"packages/{p}/src" for p in PACKAGES),
    )


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution and wheel of every package in `dist/`, checked."""
    install(session, "hatchling", "twine", "pytest")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            run(session, "python", "-m", "hatchling", "build", "-d", str(ROOT / "dist"))
    run(session, "twine", "check", "--strict", *(str(f) for f in sorted((ROOT / "dist").iterdir())))
    pytest(session, "build", "tests-integration/packaging/test_dist.py", "-p", "no:cacheprovider")


@nox.session
@nox.parametrize("package", PACKAGES)
def wheels(session: nox.Session, package: str) -> None:
    """A package's wheel alone in a clean environment runs the code of its README. Needs `build` before it."""
    built = sorted((ROOT / "dist").glob(f"{package.replace('-', '_')}-*.whl"))
    if not built:
        session.error("dist/ holds no wheel of this package; run nox -s build first")
    wheel = built[-1]
    siblings = [str(next((ROOT / "dist").glob(f"{n.replace('-', '_')}-*.whl"))) for n in closure(package)[1:]]
    install(session, str(wheel), *siblings, "--reinstall" if uses_uv(session) else "--force-reinstall", fresh=wheel)
    expected = ",".join(sorted(closure(package)))
    run(session, "python", "tests-integration/packaging/wheel_alone.py", expected, f"packages/{package}/README.md")


def install(session: nox.Session, *requirements: str, fresh: pathlib.Path | None = None) -> None:
    """One install command under the constraints; skipped when the environment was made by the same one.

    A wheel (`fresh`) counts as the same only while its content is.
    """
    constraints = os.environ.get("AM_CONSTRAINTS", str(ROOT / ".ci" / "constraints.txt"))
    files = [*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / TESTKIT / "pyproject.toml"]
    files += [pathlib.Path(constraints)] if constraints else []
    files += [fresh] if fresh else []
    recipe = "\n".join(requirements).encode() + b"".join(file.read_bytes() for file in files)
    stamp = pathlib.Path(session.virtualenv.location) / "installed-from"
    made_by = hashlib.sha256(recipe).hexdigest()
    if stamp.is_file() and stamp.read_text() == made_by:
        session.log("the environment is up to date")
        return
    options = ["-c", constraints] if constraints else []
    if not uses_uv(session):
        options.append("--no-compile")
    session.install(*options, *requirements, env=installer_environment())
    stamp.write_text(made_by)


def run(session: nox.Session, tool: str, *arguments: str) -> None:
    """Run a tool of the session's environment, or of the shared one where the session has none of its own."""
    if session.venv_backend == "none":
        tool = str(TOGETHER / tool)
    session.run(tool, *arguments, env=run_environment(), external=session.venv_backend == "none")


def pytest(session: nox.Session, name: str, *arguments: str) -> None:
    JUNIT.mkdir(parents=True, exist_ok=True)
    run(session, "python", "-m", "pytest", f"--junitxml={JUNIT}/{name}.xml", *arguments)


def torchrun(session: nox.Session, processes: int, *command: str) -> None:
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    run(session, *launcher, *command)


def run_environment() -> dict[str, str | None]:
    # One thread per rank: ranks share the cores. With bytecode off, every process would compile torch again.
    return {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": None}


def installer_environment() -> dict[str, str | None]:
    """uv does not read pip's configuration: tell it where pip looks."""
    shown = subprocess.run(  # the interpreter's own pip, with whatever files and variables configure it
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    settings: dict[str, str] = {}
    for line in shown.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"")
    # nox exports these for its own environment, and uv would take them for the target's.
    environment: dict[str, str | None] = {"UV_PYTHON": None, "PYTHONDONTWRITEBYTECODE": None}
    if links := settings.get("find-links"):
        environment["UV_FIND_LINKS"] = ",".join(links.split())
    if index := settings.get("index-url"):
        environment["UV_DEFAULT_INDEX"] = index
    return environment


def uses_uv(session: nox.Session) -> bool:
    return session.venv_backend == "uv"


def editable(*folders: str) -> list[str]:
    return [word for folder in folders for word in ("-e", folder)]


def project(package: str) -> dict:
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())


def closure(package: str) -> list[str]:
    """A package and the siblings it needs, itself first, read from the pyproject files."""
    found = [package]
    for name in found:
        for requirement in project(name)["project"]["dependencies"]:
            sibling = next((p for p in PACKAGES if requirement.startswith(p)), None)
            if sibling and sibling not in found:
                found.append(sibling)
    return found


def _processes(arguments: list[str]) -> int:
    """pp x dp x tp of the example's arguments."""
    degrees = {"--pp": 2, "--dp": 2, "--tp": 1}
    for name, value in itertools.pairwise(arguments):
        if name in degrees and value.isdigit():
            degrees[name] = int(value)
    return max(1, degrees["--pp"] * degrees["--dp"] * degrees["--tp"])
