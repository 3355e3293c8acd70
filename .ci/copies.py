"""Files that two packages hold: one owns them, the other carries copies, so that it can be installed by itself.

python .ci/copies.py            makes the copies anew; `nox -s copies` does
python .ci/copies.py --check    fails where a copy is not its original's; `nox -s lint` does
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
# The room of an original, the room that carries a copy, and the files.
COPIES = (
    (
        "am_fsdp.layout",
        "am_moe.data_parallel",
        (
            "after_layout.py",
            "batch_norm.py",
            "evaluation.py",
            "packed.py",
            "replicas.py",
            "same_towers.py",
            "same_units.py",
            "units.py",
        ),
    ),
    ("am_pipeline", "am_moe", ("_torch_compat_fakes.py",)),
)


def folder_of(room: str) -> pathlib.Path:
    """Where the sources of a room such as `am_fsdp.layout` are."""
    package = room.partition(".")[0]
    return ROOT / "packages" / package.replace("_", "-") / "src" / pathlib.Path(*room.split("."))


def stale_copies() -> list[tuple[str, str, str]]:
    """Owner, carrier and name of every copy that is not there or does not hold its original."""
    copies = [(owner, carrier, file) for owner, carrier, files in COPIES for file in files]
    return [
        (o, c, f) for o, c, f in copies if not (p := folder_of(c) / f).exists() or p.read_text() != copy_of(o, c, f)
    ]


def copy_of(owner: str, carrier: str, file: str) -> str:
    """What a file's copy holds: the original, under the names of the package that carries it."""
    text = (folder_of(owner) / file).read_text()
    packages = (room.partition(".")[0] for room in (owner, carrier))
    for name, here in ((owner, carrier), tuple(f"{package}._torch_compat" for package in packages)):
        text = text.replace(f"from {name}", f"from {here}")
    path = (folder_of(owner) / file).relative_to(ROOT)
    return f"# A copy of {path}, made by `nox -s copies`: edit that one.\n{text}"


def main() -> int:
    stale = stale_copies()
    if "--check" in sys.argv:
        for owner, carrier, file in stale:
            print(f"{folder_of(carrier) / file} is not the copy of {owner}'s; run nox -s copies", file=sys.stderr)
        return len(stale) > 0
    for owner, carrier, file in stale:
        (folder_of(carrier) / file).write_text(copy_of(owner, carrier, file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
