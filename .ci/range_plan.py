"""Who is tried with whom, as data: the lowest that each package declares, and its last release in the checkout."""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from release_plan import declared, find_packages, git, read_project, tagged

OTHERS = ("torch", "transformers")  # whose versions the sessions choose
TOGETHER = "together"  # no package


@dataclasses.dataclass(frozen=True)
class Company:
    """Packages of ours in one environment, and whose tests run there."""

    title: str
    of: str  # a package, whose own suite runs, or TOGETHER: the integration suite
    pins: tuple[str, ...]  # of torch and transformers, as requirements
    checkout: tuple[str, ...]  # packages as they are here
    tags: tuple[str, ...] = ()  # packages as they were released
    notes: tuple[str, ...] = ()  # what whoever reads the result has to know

    def __str__(self) -> str:
        held = ", ".join([*self.pins, *self.tags, *(f"{name} of the checkout" for name in self.checkout)])
        return "\n  ".join([f"{self.title}: {held}", *self.notes])


def plan_floor(root: pathlib.Path) -> list[Company]:
    """Each package beside the lowest tagged siblings in its ranges, at its lowest torch and transformers; and all.

    All together are the packages that no other needs, beside the lowest that they need, at the highest of the floors.

    Raises:
        ValueError: a range has no lower end, or no tag is in all of the ranges on a package.
    """
    order = in_order(root)
    floors = {package: {name: lowest(root, package, name) for name in OTHERS} for package in order}
    plans = []
    for package in order:
        plans.append(_with_lowest(root, package, [package], floors[package], extras=False))
    needed = {canonicalize_name(r.name) for p in order for r in declared(read_project(root, p), order)}
    highest = {name: max(floor[name] for floor in floors.values()) for name in OTHERS}
    return [*plans, _with_lowest(root, TOGETHER, [p for p in order if p not in needed], highest, extras=True)]


def plan_latest(root: pathlib.Path) -> list[Company]:
    """The checkout with whatever torch and transformers an installer takes from the ranges."""
    order = in_order(root)
    pins = tuple(sorted({str(declares(root, package, name)) for package in order for name in OTHERS}))
    return [Company(of, of, pins, tuple(order)) for of in (*order, TOGETHER)]


def plan_compat(root: pathlib.Path, pins: Iterable[str]) -> tuple[list[Company], list[str]]:
    """The last release of each package with the others of the checkout, and what the declared ranges leave out."""
    order = in_order(root)
    versions = {package: Version(read_project(root, package)["version"]) for package in order}
    plans, left_out = [], []
    for package in order:
        if not (tag := last_tag(root, package)):
            left_out.append(f"{package}: no tag {package}-vVERSION, nothing released yet")
            continue
        there = versions | {package: Version(tag.removeprefix(f"{package}-v"))}
        projects = {name: read_project(root, name, tag if name == package else None) for name in order}
        refusals = [
            f"{name} {there[name]} needs {r}, which leaves out {r.name} {there[canonicalize_name(r.name)]}"
            for name, project in projects.items()
            for r in declared(project, order)
            if not r.specifier.contains(there[canonicalize_name(r.name)], prereleases=True)
        ]
        if refusals:
            left_out.append(f"{tag}: {'; '.join(refusals)}")
            continue
        others = tuple(name for name in order if name != package)
        changed = [name for name in others if _changed(root, name)]
        note = f"changed since their own last tags: {', '.join(changed) or 'none'}"
        title = f"{tag} with the others of the checkout"
        plans.append(Company(title, TOGETHER, tuple(pins), others, (tag,), (note,)))
    return plans, left_out


def in_order(root: pathlib.Path) -> list[str]:
    """The packages, each after those that it needs, extras included."""
    packages = find_packages(root)
    needs = {p: {canonicalize_name(r.name) for r in declared(read_project(root, p), packages)} for p in packages}
    found: list[str] = []
    while rest := [p for p in packages if p not in found]:
        found += [p for p in rest if needs[p] <= set(found)] or rest
    return found


def lowest(root: pathlib.Path, package: str, name: str) -> Version:
    """The lower end of the range that a package declares of a distribution of others."""
    requirement = declares(root, package, name)
    ends = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    if not ends:
        raise ValueError(f"{package} needs {requirement}, a range without a lower end; write {name}>=X.Y")
    return max(ends)


def declares(root: pathlib.Path, package: str, name: str) -> Requirement:
    """What a package declares of a distribution of others, among what it needs or in its test group."""
    table = tomllib.loads((root / "packages" / package / "pyproject.toml").read_text())
    lines = [*table["project"].get("dependencies", []), *table.get("dependency-groups", {}).get("test", [])]
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == name:
            return requirement
    raise ValueError(f"{package} declares no range of {name}, neither in its dependencies nor in its test group")


def last_tag(root: pathlib.Path, package: str) -> str | None:
    """The tag of the highest release; of a pre-release only where there is nothing else."""
    versions = sorted(SpecifierSet().filter(tagged(root, package)))
    return f"{package}-v{versions[-1]}" if versions else None


def _with_lowest(root: pathlib.Path, of: str, roots: list[str], floors: dict[str, Version], *, extras: bool) -> Company:
    order = in_order(root)
    ranges: dict[str, SpecifierSet] = {}
    tags: dict[str, str] = {}
    checkout, notes = [], []
    for name in reversed(order):
        if name not in roots and name not in ranges:
            continue
        if name in roots:
            checkout.append(name)
        elif versions := sorted(ranges[name].filter(tagged(root, name))):
            tags[name] = f"{name}-v{versions[0]}"
        else:
            version = read_project(root, name)["version"]
            if not ranges[name].contains(version, prereleases=True):
                raise ValueError(f"{of} needs {name}{ranges[name]}: no tag is in that range, nor {version} here")
            checkout.append(name)
            notes.append(f"no release of {name} is in {ranges[name]} yet: that of the checkout stands in")
        for r in declared(read_project(root, name, tags.get(name)), order, extras=extras):
            needed = canonicalize_name(r.name)
            ranges[needed] = ranges.get(needed, SpecifierSet()) & r.specifier
    pins = tuple(f"{name}=={version}" for name, version in floors.items())
    return Company(of, of, pins, tuple(checkout), tuple(tags.values()), tuple(notes))


def _changed(root: pathlib.Path, package: str) -> bool:
    tag = last_tag(root, package)
    return tag is None or bool(git(root, "diff", "--name-only", tag, "--", f"packages/{package}"))
