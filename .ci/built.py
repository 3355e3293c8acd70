"""Build a package's distributions from a commit, and check that they are complete, reproducible, and work alone."""

from __future__ import annotations

import email.message
import email.parser
import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WHEEL_ALONE = pathlib.Path(__file__).parents[1] / "tests-integration" / "packaging" / "wheel_alone.py"


def build_twice(
    root: pathlib.Path, commit: str, package: str, scratch: pathlib.Path
) -> tuple[list[pathlib.Path], pathlib.Path]:
    """The source distribution and the wheel of a commit, and the folder they were built from.

    Raises:
        RuntimeError: a second build in another folder, of files with other times, differs in a byte.
    """
    first, second = (scratch / name / package for name in ("first", "second-build"))
    outputs = [build(root, commit, package, source) for source in (first, second)]
    hashes = [{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} for files in outputs]
    if hashes[0] != hashes[1]:
        differing = sorted(name for name, _ in hashes[0].items() ^ hashes[1].items())
        raise RuntimeError(f"two builds of {package} differ in {', '.join(dict.fromkeys(differing))}")
    return outputs[0], first


def build(root: pathlib.Path, commit: str, package: str, source: pathlib.Path) -> list[pathlib.Path]:
    """Unpack what git holds of the package at that commit, nothing else, into a folder, and build it there."""
    source.mkdir(parents=True)
    archive = source.with_suffix(".tar")
    # Of the folder's tree and not of the commit: its files then bear the time of now, which a build must not see.
    call("git", "-C", root, "archive", f"--output={archive}", f"{commit}:packages/{package}")
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="data")
    outdir = source.parent / f"dist-{package}"
    when = call("git", "-C", root, "log", "-1", "--format=%ct", commit).strip()
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", outdir, source, SOURCE_DATE_EPOCH=when)
    return sorted(outdir.iterdir())


def build_tag(root: pathlib.Path, tag: str, scratch: pathlib.Path) -> pathlib.Path:
    """The wheel of a release that was tagged earlier."""
    package = tag.rpartition("-v")[0]
    return next(f for f in build(root, f"{tag}^{{commit}}", package, scratch / tag / package) if f.suffix == ".whl")


def check_files(files: list[pathlib.Path], source: pathlib.Path, package: str, version: str) -> None:
    """Check the form with twine, and that the files hold what the folder holds.

    Raises:
        RuntimeError: something is missing, too much, or says otherwise than the folder; all of it is named.
    """
    call(sys.executable, "-m", "twine", "check", "--strict", *files)
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    readme = (source / "README.md").read_text()
    tracked = {str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()}
    problems = []
    for file in files:
        held = wheel_holds if file.suffix == ".whl" else sdist_holds
        names, metadata, missing, stray = held(file, tracked, package)
        problems += [f"{file.name} lacks {name}" for name in sorted(missing - names)]
        problems += [f"{file.name} holds {name}, which is no part of it" for name in sorted(stray)]
        problems += wrong_metadata(file.name, metadata, project, version, readme)
    if problems:
        raise RuntimeError("\n- ".join([f"what was built of {package} is not right:", *problems]))


def wheel_holds(
    wheel: pathlib.Path, tracked: set[str], package: str
) -> tuple[set[str], email.message.Message, set[str], set[str]]:
    """Its files, its metadata, what must be among the files, and what may not: a wheel is `src/` and papers."""
    module = package.replace("-", "_")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        papers = {name for name in names if name.split("/")[0].endswith(".dist-info")}
        about = next(name.split("/")[0] for name in papers)
        metadata = email.parser.Parser().parsestr(archive.read(f"{about}/METADATA").decode())
    sources = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    required = sources | {f"{module}/__init__.py", f"{module}/py.typed", f"{about}/licenses/LICENSE"}
    allowed = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    inside = {name for name in sources if name.startswith(f"{module}/")}
    return names, metadata, required, names - inside - allowed


def sdist_holds(
    sdist: pathlib.Path, tracked: set[str], package: str
) -> tuple[set[str], email.message.Message, set[str], set[str]]:
    """The same of a source distribution: sources, tests and papers, and nothing that git does not hold."""
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
        content = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        metadata = email.parser.Parser().parsestr(content.read().decode() if content else "")
    papers = {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "PKG-INFO"}
    required = papers | {name for name in tracked if name.startswith(("src/", "tests/"))}
    if not any(name.startswith("tests/") for name in tracked):
        required.add("tests/")
    return names, metadata, required, names - tracked - {"PKG-INFO"}


def wrong_metadata(file: str, metadata: email.message.Message, project: dict, version: str, readme: str) -> list[str]:
    needs = {str(r) for r in needed_here(project.get("dependencies", []))}
    says = {str(r) for r in needed_here(metadata.get_all("Requires-Dist", []))}
    problems = []
    if (metadata["Name"], metadata["Version"]) != (project["name"], version):
        problems.append(f"{file} says it is {metadata['Name']} {metadata['Version']}")
    if says != needs:
        problems.append(f"{file} needs {sorted(says)}, pyproject.toml says {sorted(needs)}")
    if str(metadata.get_payload()).strip() != readme.strip():
        problems.append(f"{file} describes itself otherwise than README.md")
    return problems


def needed_here(lines: list[str]) -> list[Requirement]:
    """Those of the requirements that an installation without extras has on this machine."""
    return [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate({"extra": ""})]


def run_alone(
    wheel: pathlib.Path,
    siblings: list[pathlib.Path],
    readme: pathlib.Path,
    environment: pathlib.Path,
    constraints: str | None,
) -> None:
    """Install a wheel with what it asks for, siblings as they were released, and run its smoke test and its README.

    The environment is kept as long as the packages ask for the same distributions of others, since torch is large.
    """
    wheels = [wheel, *siblings]
    ours = sorted(canonicalize_name(w.name.split("-")[0]) for w in wheels)
    others = {str(r) for w in wheels for r in needed_by(w) if canonicalize_name(r.name) not in ours}
    python = make_environment(environment, sorted(others), constraints)
    pip = (python, "-m", "pip")
    there = [line.split("==")[0] for line in call(*pip, "list", "--format=freeze").splitlines()]
    if before := [name for name in there if name.startswith("am-")]:
        call(*pip, "uninstall", "--quiet", "--yes", *before)
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", *wheels)
    call(*pip, "check")
    call(python, WHEEL_ALONE, ",".join(ours), readme, OMP_NUM_THREADS="1")


def needed_by(wheel: pathlib.Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        about = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.parser.Parser().parsestr(archive.read(about).decode())
    return needed_here(metadata.get_all("Requires-Dist", []))


def make_environment(folder: pathlib.Path, requirements: list[str], constraints: str | None) -> pathlib.Path:
    """A virtual environment with these requirements and pip, kept while they stay the same; its interpreter."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    limits = pathlib.Path(constraints).read_text() if constraints else ""
    recipe = "\n".join([sys.version, *requirements, limits])
    stamp = folder / "made-from"
    if stamp.is_file() and stamp.read_text() == recipe:
        return python
    call(sys.executable, "-m", "venv", "--clear", folder)
    if requirements:
        options = ["-c", constraints] if constraints else []
        call(python, "-m", "pip", "install", "--quiet", "--no-compile", *options, *requirements)
    stamp.write_text(recipe)
    return python


def call(*command: object, **settings: str) -> str:
    """What a command prints; the same is the error when it fails."""
    words = list(map(str, command))
    done = subprocess.run(
        words, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")
    return done.stdout
