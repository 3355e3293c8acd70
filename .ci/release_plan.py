"""What a release would do, as data, and which packages need one; read from git and the pyproject files."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PARTS = ("major", "minor", "patch")
HEADING = re.compile(r"^## +(?P<version>\S+).*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Sibling:
    """A declared range on another package of ours, and the tagged releases in it, oldest first."""

    requirement: str
    satisfied_by: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Release:
    """One release: what it is called, what it says, and what of ours it is installed with."""

    package: str
    old: str  # what pyproject.toml says now
    new: str
    tag: str
    entries: tuple[str, ...]  # of the changelog
    siblings: tuple[Sibling, ...]  # every declared range, those of extras included
    beside: tuple[str, ...]  # tags of the siblings that its clean environment gets
    branch: str | None  # none when HEAD is detached

    def __str__(self) -> str:
        lines = [f"{self.package} {self.old} -> {self.new}, tag {self.tag}"]
        lines += [f"  {s.requirement} is satisfied by {', '.join(s.satisfied_by)}" for s in self.siblings]
        lines += [f"  tested beside {tag}" for tag in self.beside]
        lines += [f"  {line}" for entry in self.entries for line in entry.splitlines()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Status:
    """A package, its version in the checkout, its last tag, and the commits to its folder since."""

    package: str
    version: str
    tag: str | None
    commits: int

    @property
    def needs_release(self) -> bool:
        return self.tag is None or self.commits > 0


def plan_release(root: pathlib.Path, package: str, wanted: str) -> Release:
    """Plan the release of one package from a checkout, without changing anything.

    Args:
        root: the repository, with one folder per package in `packages/`.
        package: the name of its folder.
        wanted: a version as PEP 440 writes it, or `major`, `minor` or `patch`: one step from the last tag, or from
            the version in `pyproject.toml` where nothing is tagged.

    Raises:
        ValueError: the release cannot be made; all reasons are named.
    """
    packages = find_packages(root)
    problems = _dirt(root)
    if package not in packages:
        problems.append(f"there is no package {package!r}; the packages are {', '.join(packages)}")
        raise _refused(package, wanted, problems)
    old = read_project(root, package)["version"]
    new, complaints = _next_version(root, package, Version(old), wanted)
    problems += complaints
    entries: tuple[str, ...] = ()
    if new is not None:
        entries, complaints = _changelog(root, package, new)
        problems += complaints + _left_out(root, packages, package, new)
    siblings, beside, complaints = _siblings(root, packages, package)
    problems += complaints
    if problems:
        raise _refused(package, wanted, problems)
    branch = git(root, "branch", "--show-current").strip() or None
    return Release(package, old, str(new), f"{package}-v{new}", entries, siblings, beside, branch)


def read_status(root: pathlib.Path) -> list[Status]:
    """One row per package: what changed in its folder since its highest tag."""
    rows = []
    for package in find_packages(root):
        versions = tagged(root, package)
        tag = f"{package}-v{versions[-1]}" if versions else None
        commits = git(root, "rev-list", "--count", f"{tag}..HEAD" if tag else "HEAD", "--", f"packages/{package}")
        rows.append(Status(package, read_project(root, package)["version"], tag, int(commits)))
    return rows


def increment(version: Version, part: str) -> Version:
    """The next version that is one step up; a pre-release becomes what it announces where that is such a step."""
    major, minor, patch = version.major, version.minor, version.micro
    announced = Version(f"{major}.{minor}.{patch}")
    smaller = {"major": (minor, patch), "minor": (patch,), "patch": ()}[part]
    if announced > version and not any(smaller):
        return announced
    stepped = {"major": (major + 1, 0, 0), "minor": (major, minor + 1, 0), "patch": (major, minor, patch + 1)}[part]
    return Version(".".join(map(str, stepped)))


def find_packages(root: pathlib.Path) -> list[str]:
    return sorted(file.parent.name for file in root.glob("packages/*/pyproject.toml"))


def read_project(root: pathlib.Path, package: str, tag: str | None = None) -> dict:
    """The project table of a package, in the checkout or as it was tagged."""
    path = f"packages/{package}/pyproject.toml"
    text = git(root, "show", f"{tag}:{path}") if tag else (root / path).read_text()
    return tomllib.loads(text)["project"]


def tagged(root: pathlib.Path, package: str) -> list[Version]:
    """The versions `V` of the tags `PKG-vV`, lowest first; tags that hold no version are not ours."""
    versions = []
    for tag in git(root, "tag", "--list", f"{package}-v*").split():
        try:
            versions.append(Version(tag.removeprefix(f"{package}-v")))
        except InvalidVersion:
            continue
    return sorted(versions)


def git(root: pathlib.Path, *arguments: str, text: str | None = None) -> str:
    """What git prints; it takes no locks that it could do without, so that reading leaves the index file alone."""
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _refused(package: str, wanted: str, problems: list[str]) -> ValueError:
    return ValueError("\n- ".join([f"{package} {wanted} cannot be released:", *problems]))


def _dirt(root: pathlib.Path) -> list[str]:
    changed = [line[3:] for line in git(root, "status", "--porcelain").splitlines()]
    if not changed:
        return []
    shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return [f"the tree has changes that are not committed: {shown}"]


def _next_version(root: pathlib.Path, package: str, old: Version, wanted: str) -> tuple[Version | None, list[str]]:
    versions = tagged(root, package)
    if wanted in PARTS:
        new = increment(versions[-1] if versions else old, wanted)
    else:
        try:
            new = Version(wanted)
        except InvalidVersion:
            return None, [f"{wanted!r} is not a version of PEP 440, nor one of {', '.join(PARTS)}"]
        if str(new) != wanted or new.local:
            return None, [f"{wanted!r} is not how an index writes a version: write {new.public}"]
    problems = []
    if git(root, "tag", "--list", f"{package}-v{new}"):
        problems.append(f"the tag {package}-v{new} exists")
    elif versions and new <= versions[-1]:
        problems.append(f"{new} does not increase: {package}-v{versions[-1]} is tagged")
    if new < old:
        problems.append(f"{new} does not increase: packages/{package}/pyproject.toml says {old}")
    return new, problems


def _changelog(root: pathlib.Path, package: str, new: Version) -> tuple[tuple[str, ...], list[str]]:
    """The entries under the first heading, which must be that of the version, or say that it has none yet."""
    path = f"packages/{package}/CHANGELOG.md"
    file = root / path
    headings = list(HEADING.finditer(file.read_text())) if file.is_file() else []
    if not headings:
        return (), [f"{path} has no heading: write `## {new} (unreleased)` and entries under it"]
    if not _announces(headings[0]["version"], new):
        shown = headings[0][0].strip()
        return (), [f"{path} has no entries for {new}: its first heading is `{shown}`, not `## {new} (unreleased)`"]
    section = file.read_text()[headings[0].end() : headings[1].start() if len(headings) > 1 else None]
    entries = tuple(entry.strip() for entry in re.split(r"^(?=- )", section, flags=re.MULTILINE)[1:])
    if not entries:
        return (), [f"{path} has no entries under `{headings[0][0].strip()}`: write what changed, a line each, `- …`"]
    return entries, []


def _announces(heading: str, new: Version) -> bool:
    try:
        return heading.lower() == "unreleased" or Version(heading) == new
    except InvalidVersion:
        return False


def _left_out(root: pathlib.Path, packages: list[str], package: str, new: Version) -> list[str]:
    """The checkout must install together after the release as well."""
    return [
        f"{other} in this checkout needs {requirement}, which leaves {new} out: widen that range first"
        for other in packages
        for requirement in declared(read_project(root, other), packages)
        if canonicalize_name(requirement.name) == package and not requirement.specifier.contains(new, prereleases=True)
    ]


def _siblings(
    root: pathlib.Path, packages: list[str], package: str
) -> tuple[tuple[Sibling, ...], tuple[str, ...], list[str]]:
    """The declared ranges with the tags in them, and the newest tag in range of every sibling that comes along."""
    project = read_project(root, package)
    found, problems = [], []
    for requirement in declared(project, packages):
        satisfied_by = in_range(root, requirement)
        if not satisfied_by:
            problems.append(_unsatisfied(root, packages, package, requirement))
        found.append(Sibling(str(requirement), tuple(map(str, satisfied_by))))
    beside: dict[str, str] = {}
    todo = declared(project, packages, extras=False)
    for requirement in todo:
        name = canonicalize_name(requirement.name)
        satisfied_by = in_range(root, requirement)
        if name in beside or not satisfied_by:
            continue
        beside[name] = f"{name}-v{satisfied_by[-1]}"
        for needed in declared(read_project(root, name, beside[name]), packages, extras=False):
            if not in_range(root, needed):
                problems.append(_unsatisfied(root, packages, beside[name], needed))
            todo.append(needed)
    return tuple(found), tuple(beside.values()), problems


def declared(project: dict, packages: list[str], *, extras: bool = True) -> list[Requirement]:
    """The ranges on packages of ours; an extra may name the package itself, which is no sibling."""
    optional = project.get("optional-dependencies", {}).values() if extras else ()
    lines = [*project.get("dependencies", []), *(line for group in optional for line in group)]
    found = [Requirement(line) for line in dict.fromkeys(lines)]
    return [r for r in found if canonicalize_name(r.name) in packages and canonicalize_name(r.name) != project["name"]]


def in_range(root: pathlib.Path, requirement: Requirement) -> list[Version]:
    """The tagged versions in range, lowest first; pre-releases only where there is nothing else, as installers do."""
    return sorted(requirement.specifier.filter(tagged(root, canonicalize_name(requirement.name))))


def _unsatisfied(root: pathlib.Path, packages: list[str], by: str, requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    tags = ", ".join(f"{name}-v{version}" for version in tagged(root, name)) or "none"
    order = " and then ".join(dict.fromkeys(_to_release(root, packages, requirement)))
    return f"{by} needs {requirement}, and no tagged release is in that range (tags: {tags}); release {order} first"


def _to_release(root: pathlib.Path, packages: list[str], requirement: Requirement) -> list[str]:
    """What must be tagged before this range is satisfied, in order."""
    if in_range(root, requirement):
        return []
    name = canonicalize_name(requirement.name)
    below = declared(read_project(root, name), packages, extras=False)
    return [*(needed for r in below for needed in _to_release(root, packages, r)), name]
