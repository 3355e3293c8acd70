"""Files that two packages hold: one owns them, the other carries copies, so that it can be installed by itself.

python .ci/copies.py            makes the copies anew; `nox -s copies` does
python .ci/copies.py --check    fails where a copy is not its original's; `nox -s lint` does
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
OWNER, CARRIER = "am_fsdp.layout", "am_moe.data_parallel"
FILES = ("after_layout.py", "evaluation.py", "packed.py", "replicas.py", "same_towers.py", "units.py")


def folder_of(room: str) -> pathlib.Path:
    """Where the sources of a room such as `am_fsdp.layout` are."""
    package = room.partition(".")[0]
    return ROOT / "packages" / package.replace("_", "-") / "src" / pathlib.Path(*room.split("."))


def is_copied(path: pathlib.Path) -> bool:
    """Whether a file is there and holds its original."""
    return path.exists() and path.read_text() == copy_of(path.name)


def copy_of(file: str) -> str:
    """What a file's copy holds: the original, under the names of the package that carries it."""
    text = (folder_of(OWNER) / file).read_text()
    for name, here in ((OWNER, CARRIER), ("am_fsdp._torch_compat", "am_moe._torch_compat")):
        text = text.replace(f"from {name}", f"from {here}")
    path = (folder_of(OWNER) / file).relative_to(ROOT)
    return f"# A copy of {path}, made by `nox -s copies`: edit that one.\n{text}"


def main() -> int:
    stale = [file for file in FILES if not is_copied(folder_of(CARRIER) / file)]
    if "--check" in sys.argv:
        for file in stale:
            print(f"{folder_of(CARRIER) / file} is not the copy of {OWNER}'s; run nox -s copies", file=sys.stderr)
        return len(stale) > 0
    for file in stale:
        (folder_of(CARRIER) / file).write_text(copy_of(file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
