"""Everything a maintainer runs, from nothing but Python and pip: `nox -l` lists it, bare `nox` runs what CI runs.

Local packages are installed editable, siblings in the same command, so that a sibling outside its declared range
fails the resolve. `.ci/constraints.txt` pins what the sessions install, not what users install; point AM_CONSTRAINTS at
another file, or at nothing, to try other versions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent
PACKAGES = ("am-tp-styles", "am-tp-plans", "am-fsdp", "am-moe", "am-pipeline")
TESTKIT = "tests-integration/testkit"
PROJECTS = {**{p: f"packages/{p}" for p in PACKAGES}, "am-testkit": TESTKIT}
CONSTRAINTS = os.environ.get("AM_CONSTRAINTS", str(ROOT / ".ci" / "constraints.txt"))
RELEASE_TOOLS = ("build", "hatchling", "twine", "packaging")
JUNIT = ROOT / "build" / "junit"
DIST = ROOT / "dist"
# The suites whose ranks are forked onto a GPU, too: each the one that shows what its package is for.
ON_A_GPU = (
    "am-fsdp/tests/test_strategy.py",
    "am-moe/tests/test_parallelize.py",
    "am-pipeline/tests/test_step.py",
    "am-tp-plans/tests/test_plans.py",
    "am-tp-styles/tests/test_wrapped.py",
)
# One file of each package that shows quickly whether what it promises still holds.
QUICK = (
    "am-tp-styles/tests/test_communication.py",
    "am-tp-plans/tests/test_shares.py",
    "am-fsdp/tests/test_replicas.py",
    "am-moe/tests/test_dispatch.py",
    "am-pipeline/tests/test_order.py",
    "am-pipeline/tests/test_shared.py",
)
TOGETHER = ROOT / ".nox" / "together" / ("Scripts" if sys.platform == "win32" else "bin")

# With bytecode off, every process of every session would compile torch again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "tests", "integration", "build", "wheels"]


@nox.session
def together(session: nox.Session) -> None:
    """The one environment of `train`, `integration` and `types`: all packages and transformers."""
    tools = sorted({r for p in PROJECTS for r in test_requirements(p)} | {"pyrefly"})
    install(session, *editable(*PROJECTS), *tools, "matplotlib>=3.8", "tqdm", "numpy")


@nox.session(venv_backend="none", requires=["together"])
def train(session: nox.Session) -> None:
    """The main job: `nox -s train -- --pp 2 --dp 2 --ep 2 --check`; as many processes as the degrees say."""
    torchrun(session, _processes(session.posargs), "docs/examples/train.py", *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def verify(session: nox.Session) -> None:
    """May I trust a layout on my model: `nox -s verify -- llama --pp 2 --tp 2`; a folder or module:function, too."""
    if not session.posargs:
        session.error("say which model: nox -s verify -- llama --pp 2 --tp 2")
    # It starts as many processes as the degrees say by itself, and keeps their exit code, which torchrun does not.
    run(session, "python", "docs/examples/verify.py", *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def plan(session: nox.Session) -> None:
    """Which layout: `nox -s plan -- path/to/folder --gpus 64 --memory 80GiB --batch-tokens 4M --seq-len 8192`."""
    if not session.posargs:
        session.error("say which model and how many ranks: nox -s plan -- llama --gpus 64")
    run(session, "python", "docs/examples/plan.py", *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def quick(session: nox.Session) -> None:
    """An answer within three minutes: types, and one file of tests of each package; `tests` and `lint` say the rest."""
    _check_types(session)
    files = [str(ROOT / "packages" / file) for file in QUICK]
    pytest(session, "quick", "-n", "2", *files, *session.posargs)


@nox.session
@nox.parametrize("package", [*PACKAGES, "am-testkit"], ids=[*PACKAGES, "testkit"])
def tests(session: nox.Session, package: str) -> None:
    """A package's own suite, in an environment with that package, what it declares, and its test tools."""
    tools = test_requirements(package)
    install(session, *editable(*siblings(package), "am-testkit"), *tools)
    refuse_undeclared(session, package, "am-testkit", *tools)
    cores = os.cpu_count() or 1
    chosen = any(a.startswith(("-n", "--numproc")) for a in session.posargs)
    spread = () if chosen else ("-n", max(2, cores // 2))  # ranks wait for each other much of their time
    pytest(session, f"tests-{package}", f"{PROJECTS[package]}/tests", *map(str, spread), *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
@nox.parametrize("ranks", [2, 4, 8], ids=["2", "4", "8"])
def integration(session: nox.Session, ranks: int) -> None:
    """The packages together, every rank of torchrun in lockstep; NCCL where there are that many GPUs, else gloo.

    Tests that start programs of their own run beside each other, in processes of their own, with the launch of two.
    """
    ignored = (f"--ignore={TESTKIT}", "--ignore=tests-integration/packaging")
    fewer = f"--min-ranks={ranks // 2 + 1 if ranks > 2 else 0 if session.posargs else 1}"  # others have run already
    arguments = ("-p", "no:xdist", junit(f"integration-{ranks}"), fewer, *ignored)
    torchrun(session, ranks, "-m", "pytest", *arguments, *(session.posargs or ["tests-integration"]))
    if ranks == 2 and not session.posargs:
        pytest(session, "integration-programs", "-n", "2", "-m", "not ranks", *ignored, "tests-integration")


@nox.session(venv_backend="none", requires=["together"])
def gpu(session: nox.Session) -> None:
    """What only a GPU shows, the compositions, and the packages' tests over ranks, up to four of them on one GPU.

    Without a GPU every test that needs one says so, and the others run on the CPU.
    """
    files = [*ROOT.glob("packages/*/tests/test_gpu*.py"), ROOT / "packages" / "am-moe" / "tests" / "test_kernels.py"]
    files += [ROOT / "tests-integration" / name for name in ("test_train_gpu.py", "test_compositions.py")]
    files += [ROOT / "packages" / name for name in ON_A_GPU]
    workers = ("-n", str(max(1, (os.cpu_count() or 1) // 2)), "--max-ranks=4")
    pytest(session, "gpu", "-rs", *workers, *(session.posargs or map(str, sorted(files))))


@nox.session(venv_backend="none", requires=["together"])
def sweep(session: nox.Session) -> None:
    """Every architecture of transformers under every parallelism; writes the tables in `docs/coverage/`."""
    folder = ROOT / "build" / "sweep"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    session.env["AM_SWEEP"] = str(folder)
    for package in PACKAGES[1:]:
        kinds = (
            "test_*sweep.py",
            "test_habits.py",
            "test_heads.py",
            "test_encoders.py",
            "test_*images.py",
            "test_some_ranks.py",
            "test_context_parallel_heads.py",
        )
        tests = sorted(str(file) for kind in kinds for file in ROOT.glob(f"packages/{package}/tests/{kind}"))
        pytest(session, f"sweep-{package}", *tests, *session.posargs)
    pytest(session, "sweep-together", "tests-integration/test_experts_in_pipelines.py", *session.posargs)
    tables = ("pipeline", "heads", "images", "some_ranks", "tensor", "encoders", "data", "experts", "context")
    tables += ("context_heads", "context_images", "data_heads")
    run(session, "python", "docs/coverage/tables.py", str(folder), *tables)


@nox.session(venv_backend="none", requires=["together"])
def compositions(session: nox.Session) -> None:
    """Every composition on up to eight ranks, every resume and every condition; writes their table in `docs/`."""
    folder = ROOT / "build" / "compositions"
    if not session.posargs:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    session.env["AM_SWEEP"] = str(folder)
    names = ("test_compositions.py", "test_conditions.py", "test_train.py", "test_finetune.py")
    tests = [f"tests-integration/{name}" for name in names]
    pytest(session, "compositions", *tests, *session.posargs)
    run(session, "python", "docs/coverage/tables.py", str(folder), "compositions")


@nox.session(venv_backend="none", requires=["together"])
def garbled(session: nox.Session) -> None:
    """A hundred thousand damaged files for each parser, ten thousand damaged configs for each command."""
    session.env["AM_GARBLED"] = "100000"
    files = sorted(str(file) for file in ROOT.glob("packages/*/tests/test_garbled.py"))
    pytest(session, "garbled", *files, *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def mutants(session: nox.Session) -> None:
    """Change one thing in the code that sums, masks, places or sends, 150 times: do its tests notice?"""
    run(session, "python", "tests-integration/mutants.py", *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def seeds(session: nox.Session) -> None:
    """The first case of every test on two ranks, as torchrun starts them: processes that order sets differently."""
    for package in PACKAGES:
        arguments = (junit(f"seeds-{package}"), "-p", "no:xdist", "-m", "ranks", "--first-cases")
        torchrun(session, 2, "-m", "pytest", *arguments, f"packages/{package}/tests", *session.posargs)


@nox.session(venv_backend="none", requires=["together"])
def survival(session: nox.Session) -> None:
    """Every fault on two layouts of the main job, and a soak; writes `docs/reliability.md`."""
    folder = ROOT / "build" / "survival"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    session.env["AM_SURVIVAL"] = str(folder)
    pytest(session, "survival", "-p", "no:xdist", "tests-integration/test_survival.py", *session.posargs)
    run(session, "python", "docs/reliability.py", str(folder))


@nox.session
def floor(session: nox.Session) -> None:
    """The lowest torch, transformers and tagged siblings that are declared; downloads gigabytes; `-- am-moe -x`."""
    _ranges(session, "floor")


@nox.session
def latest(session: nox.Session) -> None:
    """The newest torch and transformers in the declared ranges; downloads gigabytes; `-- am-moe -x`."""
    _ranges(session, "latest")


@nox.session
def compat(session: nox.Session) -> None:
    """The last release of each package, from its tag, with the others of the checkout; `-- am-moe` picks some."""
    _ranges(session, "compat")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, undeclared imports, and who may import whom."""
    install(session, "ruff", "deptry", "pytest", "hypothesis", "packaging", "zizmor")
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "python", ".ci/copies.py", "--check")
    run(session, "zizmor", "--quiet", "--offline", ".github/workflows")
    for package in PACKAGES:
        with session.chdir(PROJECTS[package]):
            run(session, "deptry", "src", "--known-first-party", package.replace("-", "_"))
    checks = ("test_sibling_graph.py", "test_release_plan.py", "test_range_plan.py", "test_workflows.py")
    pytest(session, "lint", *(f"tests-integration/packaging/{name}" for name in checks))


@nox.session(venv_backend="none")
def copies(session: nox.Session) -> None:
    """The files of am-fsdp that am-moe carries, so that it needs no other package, copied anew."""
    session.run(sys.executable, ".ci/copies.py", external=True)


@nox.session(venv_backend="none", requires=["together"])
def types(session: nox.Session) -> None:
    """Static types of the five packages, and their public surface as it was recorded."""
    _check_types(session)
    pytest(session, "types", "-p", "no:xdist", "tests-integration/packaging/test_public_surface.py")


@nox.session
def docs(session: nox.Session) -> None:
    """The site in `build/docs`, made offline; a dead link or any other warning fails it."""
    install(session, *editable(*PACKAGES), "sphinx", "furo", "myst-parser", "pytest")
    site = ROOT / "build" / "docs"
    shutil.rmtree(site, ignore_errors=True)
    strict = ("--fail-on-warning", "--keep-going", "--nitpicky", "--quiet")
    run(session, "python", "-m", "sphinx", *strict, "-d", f"{site}.doctrees", "docs", str(site))
    pytest(session, "docs", "tests-integration/packaging/test_site.py")


@nox.session
def build(session: nox.Session) -> None:
    """Source distribution of every package in `dist/`, and its wheel built from that; both checked."""
    install(session, "build", "hatchling", "twine", "pytest")
    shutil.rmtree(DIST, ignore_errors=True)
    for package in PACKAGES:
        run(session, "python", "-m", "build", "--no-isolation", "--outdir", str(DIST), PROJECTS[package])
    run(session, "twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))
    pytest(session, "build", "tests-integration/packaging/test_dist.py")


@nox.session(requires=["build"])
def wheels(session: nox.Session) -> None:
    """Each wheel alone, with what its own metadata asks for, runs its README; `-- am-moe` picks some."""
    install(session, "torch")
    for package in session.posargs or PACKAGES:
        uninstall(session, *PACKAGES)
        session.install("--no-index", f"--find-links={DIST}", package, env=installer_settings())
        refuse_undeclared(session, package)
        expected = ",".join(sorted(siblings(package)))
        run(session, "python", "tests-integration/packaging/wheel_alone.py", expected, f"{PROJECTS[package]}/README.md")


@nox.session
def release(session: nox.Session) -> None:
    """Build, check, commit and tag one package: `nox -s release -- am-moe minor`; `--dry-run`, `--publish`."""
    install(session, *RELEASE_TOOLS)
    run(session, "python", ".ci/release.py", "release", f"--constraints={CONSTRAINTS}", *session.posargs)


@nox.session(name="release-status", venv_backend="none")
def release_status(session: nox.Session) -> None:
    """Commits to each package since its last tag, and whether it needs a release."""
    session.run(sys.executable, ".ci/release.py", "status", external=True)


@nox.session(name="release-check")
def release_check(session: nox.Session) -> None:
    """Release small packages, and all five in clones of HEAD, out of order and in order; `compat` among them."""
    install(session, *RELEASE_TOOLS, "pytest")
    session.env["AM_CONSTRAINTS"] = CONSTRAINTS
    names = ("test_release.py", "test_release_all.py", "test_compat.py")
    checks = [f"tests-integration/packaging/{name}" for name in names]
    pytest(session, "release-check", "-rP", *checks, *session.posargs)


def _check_types(session: nox.Session) -> None:
    sources = [f"{PROJECTS[p]}/src" for p in PACKAGES]
    run(session, "pyrefly", "check", "--python-interpreter-path", str(TOGETHER / "python"), *sources)


def _ranges(session: nox.Session, kind: str) -> None:
    install(session, *RELEASE_TOOLS)
    run(session, "python", ".ci/ranges.py", kind, f"--constraints={CONSTRAINTS}", *session.posargs)


def install(session: nox.Session, *requirements: str) -> None:
    """One install command under the constraints, skipped when the same one made this environment.

    When anything changed the environment is made anew: what is no longer declared must not linger in it.
    """
    files = [ROOT / folder / "pyproject.toml" for folder in PROJECTS.values()]
    files += [pathlib.Path(CONSTRAINTS)] if CONSTRAINTS else []
    recipe = "\n".join(requirements).encode() + b"".join(file.read_bytes() for file in files)
    made_by = hashlib.sha256(recipe).hexdigest()
    stamp = pathlib.Path(session.virtualenv.location) / "installed-from"
    if stamp.is_file() and stamp.read_text() == made_by:
        session.log("the environment is up to date")
        return
    if set(installed(session)) - {"pip"}:
        session.virtualenv.reuse_existing = False
        session.virtualenv.create()
    options = ["-c", CONSTRAINTS] if CONSTRAINTS else []
    if not uses_uv(session):
        options.append("--no-compile")  # the first import compiles what is used, a tenth of what is installed
    named = [r for r in requirements if r != "-e"]
    session.log(f"installs {len(named)} requirements and what they need, once: minutes where torch is among them")
    begun = time.monotonic()
    session.install(*options, *requirements, env=installer_settings())
    session.log(f"installed {', '.join(named)} in {time.monotonic() - begun:.0f} s")
    stamp.write_text(made_by)


def uninstall(session: nox.Session, *names: str) -> None:
    if uses_uv(session):
        session.run("uv", "pip", "uninstall", "--quiet", *names, external=True)
    else:
        session.run("python", "-m", "pip", "uninstall", "-qq", "--yes", *names)


def refuse_undeclared(session: nox.Session, *roots: str) -> None:
    """Fail when the environment holds a distribution that these requirements do not lead to."""
    found = installed(session)
    reached: set[tuple[str, frozenset[str]]] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        node = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if node in reached or node[0] not in found:
            continue
        reached.add(node)
        for needed in map(Requirement, found[node[0]].requires or []):
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    strangers = sorted(set(found) - {name for name, _ in reached} - {"pip"})
    if strangers:
        session.error(f"{', '.join(strangers)} came along, but {', '.join(roots)} do not ask for it")


def installed(session: nox.Session) -> dict[str, importlib.metadata.Distribution]:
    location = pathlib.Path(session.virtualenv.location)
    folders = [str(f) for f in (*location.glob("lib/python*/site-packages"), *location.glob("Lib/site-packages"))]
    return {canonicalize_name(d.name): d for d in importlib.metadata.distributions(path=folders)}


def run(session: nox.Session, tool: str, *arguments: str) -> None:
    """Run a tool of the session's environment, or of the shared one where the session has none of its own."""
    # One thread per rank: ranks share the cores. After Ctrl-C, ranks get the time that a checkpoint takes.
    patience = {"interrupt_timeout": 120.0, "terminate_timeout": 30.0}
    environment = {"OMP_NUM_THREADS": "1"}
    shared = session.venv_backend == "none"
    session.run(tool_of(session, tool), *arguments, env=environment, external=shared, **patience)


def tool_of(session: nox.Session, tool: str) -> str:
    """What a tool is called: by its path in the shared environment, where the session has none of its own."""
    return str(TOGETHER / tool) if session.venv_backend == "none" else tool


def pytest(session: nox.Session, name: str, *arguments: str) -> None:
    run(session, "python", "-m", "pytest", junit(name), *arguments)


def torchrun(session: nox.Session, processes: int, *command: str) -> None:
    """Start ranks, each with a hash seed of its own as on a cluster, where the order of a set differs between them."""
    launcher = ("python", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python")
    own_seed = ("bash", "-c", 'PYTHONHASHSEED=$((RANK + 1)) exec "$@"', "rank")
    run(session, *launcher, *own_seed, tool_of(session, "python"), *command)


def junit(name: str) -> str:
    """The pytest option for a report of this name; an older report of that name is gone."""
    JUNIT.mkdir(parents=True, exist_ok=True)
    report = JUNIT / f"{name}.xml"
    report.unlink(missing_ok=True)
    return f"--junitxml={report}"


@functools.cache
def installer_settings() -> dict[str, str]:
    """pip's own configuration in uv's words, since uv does not read it; what is set for uv already stays."""
    settings: dict[str, list[str]] = {}
    for line in sorted(pip("config", "list").splitlines(), key=lambda shown: shown.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = ast.literal_eval(value).split()
    mirrored = {
        "UV_FIND_LINKS": ",".join(settings.get("find-links", [])),
        "UV_DEFAULT_INDEX": " ".join(settings.get("index-url", [])),
        "UV_INDEX": " ".join(settings.get("extra-index-url", [])),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", [])),
        "SSL_CERT_FILE": " ".join(settings.get("cert", [])),
        "UV_INDEX_STRATEGY": "unsafe-best-match",  # as pip does: the best version of any index
        "UV_BUILD_CONSTRAINT": CONSTRAINTS,
        "PIP_BUILD_CONSTRAINT": CONSTRAINTS,
    }
    return {name: value for name, value in mirrored.items() if value and name not in os.environ}


def pip(*arguments: str) -> str:
    """What pip prints; nothing where nox was installed without a pip beside it."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def uses_uv(session: nox.Session) -> bool:
    return session.venv_backend == "uv"


def editable(*names: str) -> list[str]:
    return [word for name in dict.fromkeys(names) for word in ("-e", PROJECTS[name])]


def project(name: str) -> dict:
    return nox.project.load_toml(ROOT / PROJECTS[name] / "pyproject.toml")


def test_requirements(name: str) -> list[str]:
    """The test group of a package, less the kit, which is installed from the checkout."""
    return [r for r in nox.project.dependency_groups(project(name), "test") if r != "am-testkit"]


def siblings(package: str) -> list[str]:
    """A package and the packages of ours that it needs, itself first, read from the pyproject files."""
    found = [package]
    for name in found:
        needed = [canonicalize_name(Requirement(r).name) for r in project(name)["project"]["dependencies"]]
        found += [n for n in needed if n in PACKAGES and n not in found]
    return found


def _processes(arguments: list[str]) -> int:
    """pp x dp-replicate x dp x cp x tp of the example's arguments."""
    degrees = {"--pp": 2, "--dp-replicate": 1, "--dp": 2, "--cp": 1, "--tp": 1}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in degrees and value.isdigit():
            degrees[name] = int(value)
    return max(1, math.prod(degrees.values()))
