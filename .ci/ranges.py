"""Try what the packages declare: the lowest and the newest of their ranges, and each last release with the others here.

python .ci/ranges.py floor
python .ci/ranges.py latest am-moe -k mixtral
python .ci/ranges.py compat
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib

import built
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from range_plan import OTHERS, TOGETHER, Company, find_packages, last_tag, plan_compat, plan_floor, plan_latest

ROOT = pathlib.Path(__file__).parents[1]
TESTKIT = "tests-integration/testkit"
# What of a suite runs. The sweeps over every architecture are for the versions that are pinned.
OWN_CORE = ("--ignore-glob=*sweep.py",)
TOGETHER_CORE = ("tests-integration/test_compositions.py", "tests-integration/test_experts_in_pipelines.py")
RANKS = 4


def try_all(root: pathlib.Path, plans: list[Company], constraints: str | None, options: list[str], kind: str) -> None:
    """Run the tests of every company, each in an environment with its versions, which are kept in `.nox/`.

    Raises:
        RuntimeError: some failed, after all ran; they are named.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="ranges-") as folder:
        scratch = pathlib.Path(folder)
        limits = without_others(constraints, scratch / "constraints.txt")
        wheels = {tag: built.build_tag(root, tag, scratch) for plan in plans for tag in plan.tags}
        for plan in plans:
            report(f"\n{plan}")
            python = environment(root, plan, limits)
            put_in(root, python, plan, [wheels[tag] for tag in plan.tags])
            ours = [*plan.checkout, *(tag.rpartition("-v")[0] for tag in plan.tags)]
            report("  there: " + ", ".join(versions(python, [*OTHERS, *ours])))
            name = f"{kind}-{'-'.join(plan.tags) if kind == 'compat' else plan.of}"
            if run_tests(root, python, plan, options, name):
                failed.append(plan)
    if failed:
        raise RuntimeError("\n- ".join([f"{len(failed)} of {len(plans)} failed, see above:", *map(str, failed)]))
    report(f"\n{len(plans)} of {len(plans)} passed")


def environment(root: pathlib.Path, plan: Company, constraints: str | None) -> pathlib.Path:
    """An environment with these versions of torch and transformers, and what any of our test groups asks for."""
    tables = [tomllib.loads(file.read_text()) for file in sorted(root.glob("packages/*/pyproject.toml"))]
    tables.append(tomllib.loads((root / TESTKIT / "pyproject.toml").read_text()))
    lines = [line for table in tables for line in table["project"].get("dependencies", [])]
    lines += [line for table in tables for line in table.get("dependency-groups", {}).get("test", [])]
    asked = {str(r) for r in map(Requirement, lines) if not canonicalize_name(r.name).startswith("am-")}
    # numpy, matplotlib and tqdm are what the examples need, the last two what installing a checkout needs.
    requirements = sorted({*asked, *plan.pins, "numpy", "matplotlib", "tqdm", "hatchling", "editables"})
    exact = all("==" in pin for pin in plan.pins)
    name = re.sub(r"[^\w.]+", "-", "-".join(["at" if exact else "from", *plan.pins]))
    python = built.make_environment(root / ".nox" / name, requirements, constraints)
    if not exact:  # what is there may be from before the newest
        options = ["-c", constraints] if constraints else []
        built.call(python, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade", *options, *plan.pins)
    return python


def put_in(root: pathlib.Path, python: pathlib.Path, plan: Company, wheels: list[pathlib.Path]) -> None:
    """Exchange what of ours is installed; pip then checks every declared range."""
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    there = [line.split("==")[0].split(" @ ")[0] for line in built.call(*pip, "list", "--format=freeze").splitlines()]
    if before := [name for name in there if name.startswith("am-")]:
        built.call(*pip, "uninstall", "--quiet", "--yes", *before)
    folders = [root / "packages" / name for name in plan.checkout] + [root / TESTKIT]
    editable = [word for folder in folders for word in ("--editable", folder)]
    built.call(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", *editable, *wheels)
    built.call(*pip, "check")


def run_tests(root: pathlib.Path, python: pathlib.Path, plan: Company, options: list[str], name: str) -> int:
    """The core of a package's own suite, or of the integration suite on four ranks; the exit status."""
    junit = root / "build" / "junit" / f"{name}.xml"
    junit.parent.mkdir(parents=True, exist_ok=True)
    tests = ("-m", "pytest", "-q", f"--junitxml={junit}")
    if plan.of == TOGETHER:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}")
        words = [python, *launcher, *tests, "-p", "no:xdist", *TOGETHER_CORE, *options]
    else:
        words = [python, *tests, f"packages/{plan.of}/tests", *OWN_CORE, *options]
    report("+ " + shlex.join(map(str, words)))
    # One thread per rank: ranks share the cores.
    return subprocess.run(
        list(map(str, words)), cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    ).returncode


def without_others(constraints: str | None, file: pathlib.Path) -> str | None:
    """The constraints, less those on what the plans choose."""
    if not constraints:
        return None
    lines = pathlib.Path(constraints).read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if re.split(r"[=<>~! ]", line)[0] not in OTHERS))
    return str(file)


def pinned(root: pathlib.Path, constraints: str | None) -> list[str]:
    """The constraints on torch and transformers, or their declared ranges where there are none."""
    lines = pathlib.Path(constraints).read_text().splitlines() if constraints else []
    found = [line for line in lines if re.split(r"[=<>~! ]", line)[0] in OTHERS]
    return found or list(plan_latest(root)[0].pins)


def versions(python: pathlib.Path, names: list[str]) -> list[str]:
    script = "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep='\\n')"
    return built.call(python, "-c", script, *names).splitlines()


def report(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["floor", "latest", "compat"])
    parser.add_argument("--constraints", help="a file of versions for everything else")
    arguments, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    packages = find_packages(ROOT)
    picked = []
    while rest and rest[0] in (*packages, TOGETHER):
        picked.append(rest.pop(0))
    try:
        if arguments.kind == "compat":
            plans, left_out = plan_compat(ROOT, pinned(ROOT, arguments.constraints))
            for line in left_out:
                report(line)
            if not any(last_tag(ROOT, package) for package in packages):
                report("nothing released yet: no package has a tag, so there was nothing to try")
                return
            chosen = [plan for plan in plans if not picked or plan.tags[0].rpartition("-v")[0] in picked]
        else:
            plans = plan_floor(ROOT) if arguments.kind == "floor" else plan_latest(ROOT)
            chosen = [plan for plan in plans if not picked or plan.of in picked]
        if not chosen:
            report(f"nothing to try of {', '.join(picked or packages)}")
            return
        try_all(ROOT, chosen, arguments.constraints, rest, arguments.kind)
    except (ValueError, RuntimeError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
