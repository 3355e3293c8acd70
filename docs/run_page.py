"""Run the code of pages from top to bottom, and hold what it prints against what the page shows.

    python docs/run_page.py docs/how/*.md                  on one process
    torchrun --standalone --nproc-per-node 2 docs/run_page.py docs/guides/pipeline.md
    python docs/run_page.py --commands docs/*/*.md         the `$ python -m am_...` lines of console blocks instead

A block of Python is one script with those before it. A block of text right behind it is what it prints; a line `...`
stands for any lines. What was compared is printed, one line for each block.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: pathlib.Path
    line: int
    language: str
    text: str
    shown: str | None = None  # what the page says that it prints

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def main(arguments: list[str]) -> None:
    commands = "--commands" in arguments
    for page in (pathlib.Path(a) for a in arguments if not a.startswith("--")):
        for block in blocks(page):
            if commands and block.language == "console":
                run_commands(block)
        if not commands:
            run_page(page)


def blocks(page: pathlib.Path) -> list[Block]:
    source = page.read_text()
    found = list(FENCE.finditer(source))
    out = []
    for fence, behind in itertools.zip_longest(found, found[1:]):
        language, text = fence.groups()
        line = source.count("\n", 0, fence.start(2)) + 1
        is_output = behind and behind[1] == "text" and not source[fence.end() : behind.start()].strip()
        out.append(Block(page, line, language, text, behind[2] if language == "python" and is_output else None))
    return out


def run_page(page: pathlib.Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            check(block, printed(lambda code=code: exec(code, names)), block.shown)  # noqa: S102


def run_commands(block: Block) -> None:
    for command, shown in sessions(block.text):
        python, dash_m, module, *arguments = shlex.split(command)
        if (python, dash_m) != ("python", "-m") or not module.startswith("am_"):
            continue
        tool = importlib.import_module(f"{module}.__main__")
        check(block, printed(lambda tool=tool, arguments=arguments: tool.main(arguments)), shown)


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block with what it printed."""
    for session in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = session.partition("\n")
        yield command, shown


def printed(run: Callable[[], object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run()
    return out.getvalue()


def check(block: Block, text: str, shown: str | None) -> None:
    """A rank that prints nothing has nothing to show; one that prints must print what the page says."""
    if shown is None or not text:
        return
    if not matches(_lines(text), _lines(shown)):
        sys.exit(f"{block} prints\n{text}\nbut the page shows\n{shown}")
    print(f"{block} prints what it shows", flush=True)


def matches(lines: list[str], shown: list[str]) -> bool:
    if not shown:
        return not lines
    if shown[0].strip() == "...":
        return any(matches(lines[skipped:], shown[1:]) for skipped in range(len(lines) + 1))
    return bool(lines) and lines[0] == shown[0] and matches(lines[1:], shown[1:])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


if __name__ == "__main__":
    main(sys.argv[1:])
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(0)  # gloo may abort an interpreter that finalises
