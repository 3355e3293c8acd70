"""Release one package: plan it, build it from a commit in a worktree of its own, check what was built, tag that commit.

python .ci/release.py release am-moe minor --dry-run
python .ci/release.py status
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import built
from release_plan import HEADING, Release, git, plan_release, read_status

ROOT = pathlib.Path(__file__).parents[1]


def release(
    root: pathlib.Path,
    package: str,
    wanted: str,
    *,
    dry_run: bool = False,
    upload_to: list[str] | None = None,
    constraints: str | None = None,
    environment: pathlib.Path | None = None,
) -> Release:
    """Release a package of a repository, whose tree, index and refs stay as they are until all checks passed.

    The released files are left in `build/released/`.

    Args:
        root: the repository.
        package: the name of its folder in `packages/`.
        wanted: a version, or `major`, `minor`, `patch`.
        dry_run: stop after the checks.
        upload_to: options of `twine upload`; none means that nothing is uploaded.
        constraints: a constraints file for what is installed beside the wheel.
        environment: where the clean environment is kept; `.nox/release-alone` of the repository unless given.

    Raises:
        ValueError: the release is refused before anything was done; all reasons are named.
        RuntimeError: a build, a check or git failed, and nothing is tagged; or the upload did, and the tag stands.
    """
    plan = plan_release(root, package, wanted)
    if plan.branch is None and not dry_run:
        raise ValueError(f"{package} {plan.new} cannot be released: HEAD is on no branch that could take the commit")
    report(str(plan))
    with worktree(root) as tree, tempfile.TemporaryDirectory(prefix="release-") as folder:
        commit = commit_version(tree, plan, thrown_away=dry_run)
        scratch = pathlib.Path(folder)
        files, source = built.build_twice(root, commit, package, scratch)
        report("built twice, byte for byte the same: " + ", ".join(file.name for file in files))
        built.check_files(files, source, package, plan.new)
        report("twine check passed; the files hold the package, its types, its papers and nothing else")
        siblings = [built.build_tag(root, tag, scratch) for tag in plan.beside]
        environment = environment or root / ".nox" / "release-alone"
        wheel = next(file for file in files if file.suffix == ".whl")
        built.run_alone(wheel, siblings, source / "README.md", environment, constraints)
        report("the wheel works alone: " + " with ".join([wheel.stem, *plan.beside]))
        if dry_run:
            report(f"dry run: {plan.tag} was not tagged, nothing changed")
            return plan
        git(root, "merge", "--quiet", "--ff-only", commit)
        notes = "\n".join([f"{package} {plan.new}", "", *plan.entries])
        git(root, "tag", "--annotate", "--cleanup=whitespace", "--file=-", plan.tag, commit, text=notes)
        kept = keep(files, root / "build" / "released")
    report(f"tagged {plan.tag}; push it with: git push --atomic origin {plan.branch} {plan.tag}")
    if upload_to is None:
        report(f"not uploaded; the files are in {kept[0].parent}")
    else:
        upload(kept, upload_to)
    return plan


@contextlib.contextmanager
def worktree(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A second working tree at HEAD, on no branch, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="release-tree-") as folder:
        tree = pathlib.Path(folder) / "tree"
        git(root, "worktree", "add", "--quiet", "--detach", str(tree), "HEAD")
        try:
            yield tree
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


def commit_version(tree: pathlib.Path, plan: Release, *, thrown_away: bool) -> str:
    """Write the version and today's date into the package's files and commit that; returns the commit."""
    folder = tree / "packages" / plan.package
    today = datetime.datetime.now(tz=datetime.UTC).date()
    version_line = re.compile(rf'^version = "{re.escape(plan.old)}"$', re.MULTILINE)
    replace_once(folder / "pyproject.toml", version_line, f'version = "{plan.new}"')
    replace_once(folder / "CHANGELOG.md", HEADING, f"## {plan.new} ({today})", first_of_many=True)
    # A rehearsal needs no name and no key of whoever rehearses.
    nobody = ("-c", "user.name=dry run", "-c", "user.email=dry-run@localhost", "-c", "commit.gpgsign=false")
    # Empty where both files say it already: then a release was interrupted before its tag.
    commit = ("commit", "--quiet", "--all", "--allow-empty", "-m", f"Release {plan.package} {plan.new}")
    git(tree, *(nobody if thrown_away else ()), *commit)
    return git(tree, "rev-parse", "HEAD").strip()


def replace_once(file: pathlib.Path, pattern: re.Pattern, new: str, *, first_of_many: bool = False) -> None:
    text = file.read_text()
    found = len(pattern.findall(text))
    if found != 1 and not (found and first_of_many):
        raise RuntimeError(f"{file.name} has {found} lines that match {pattern.pattern}, not one")
    file.write_text(pattern.sub(new, text, count=1))


def keep(files: list[pathlib.Path], outdir: pathlib.Path) -> list[pathlib.Path]:
    outdir.mkdir(parents=True, exist_ok=True)
    return [pathlib.Path(shutil.copy2(file, outdir)) for file in files]


def upload(files: list[pathlib.Path], options: list[str]) -> None:
    command = ["twine", "upload", "--disable-progress-bar", *options, *map(str, files)]
    if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        raise RuntimeError(f"the upload failed; the tag stands, try again with: {' '.join(command)}")
    report(f"uploaded {', '.join(file.name for file in files)}")


def report(text: str) -> None:
    print(text, flush=True)


def print_status(root: pathlib.Path) -> None:
    rows = [("package", "version", "last tag", "commits since", "needs a release")]
    for status in read_status(root):
        needs = "yes" if status.needs_release else "no"
        rows.append((status.package, status.version, status.tag or "none", str(status.commits), needs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        report("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="print which packages changed since their last tags")
    one = commands.add_parser("release", prog="nox -s release --", help="release one package")
    one.add_argument("package")
    one.add_argument("version", help="as PEP 440 writes it, or major, minor or patch")
    how = one.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="check everything, change nothing")
    how.add_argument("--publish", action="store_true", help="upload what was tagged")
    one.add_argument("--repository-url", help="the index that --publish uploads to, instead of PyPI")
    one.add_argument("--constraints", help="a file of versions for what is installed beside the wheel")
    arguments = parser.parse_args()
    if arguments.command == "status":
        print_status(ROOT)
        return
    # Ended from outside, the worktree goes as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    if arguments.repository_url and not arguments.publish:
        one.error("--repository-url is for --publish")
    to = ["--repository-url", arguments.repository_url] if arguments.repository_url else []
    try:
        release(
            ROOT,
            arguments.package,
            arguments.version,
            dry_run=arguments.dry_run,
            upload_to=to if arguments.publish else None,
            constraints=arguments.constraints,
        )
    except (ValueError, RuntimeError) as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
