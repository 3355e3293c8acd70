"""Damaged files: valid ones with bytes lost, doubled, moved and replaced, to show parsers what nobody thought of."""

from __future__ import annotations

import os
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# What trips parsers: numbers at the ends of their types, endless ones, nesting, other alphabets, no text at all.
_NASTY = (
    *("0", "-1", "9" * 5000, "1" * 12, "4294967296", "9223372036854775808", "1e999", "0.5", "NaN", "-Infinity"),
    *("null", "true", "[]", "{}", "[" * 5000, '{"":' * 3000, '""', "\\ud800", "\\u0000", "\x00", "\n", "\r\n", " "),
    *(",", ";", ":", "(", ")", '"', "'", "../", "/", "\u0661", "\ufeff", "é", "🙂", "#"),
)
_BYTES = (b"\xff", b"\xc3", b"\x80", b"\xed\xa0\x80")
NUMBER = int(os.environ.get("AM_GARBLED", "400"))


def garbled(valid: Sequence[bytes], words: Sequence[str] = (), number: int = NUMBER) -> Iterator[bytes]:
    """`number` damaged texts, the same in every run; `AM_GARBLED` sets how many unless a test does.

    Args:
        valid: texts that the parser takes.
        words: of its language, put in anywhere.
    """
    chance = random.Random(0)  # noqa: S311  (no secret)
    pieces = [*(word.encode() for word in (*_NASTY, *words)), *_BYTES]
    for _ in range(number):
        text = bytearray(chance.choice(valid))
        for _ in range(chance.choice((1, 1, 2, 3, 8))):
            at = chance.randrange(len(text) + 1)
            until = min(len(text), at + chance.choice((0, 1, 1, 2, 5, 40)))
            piece = text[at:until]
            how = chance.randrange(5)
            if how == 0:
                del text[at:until]
            elif how == 1:
                text[at:until] = chance.choice(pieces)
            elif how == 2:
                text[at:at] = chance.choice(pieces)
            elif how == 3:
                text[at:at] = piece * chance.choice((1, 2, 50))
            else:
                del text[at:until]
                place = chance.randrange(len(text) + 1)
                text[place:place] = piece
        yield bytes(text)


def assert_configs_end_in_words(main: Callable[[list[str]], int], arguments: Sequence[str], config: Any) -> None:
    """A command that reads the config of a model prints a result or an error, whatever is in the file.

    Args:
        main: takes arguments, returns an exit code.
        arguments: the last is a folder.
        config: a valid one, which is written there and damaged over and over.
    """
    config.save_pretrained(arguments[-1])
    path = pathlib.Path(arguments[-1]) / "config.json"
    valid = path.read_bytes()
    assert main([*arguments]) == 0
    words = ['"hidden_size"', '"llama"', '"qwen3_moe"', '"vocab_size"', "64", "3", "0", "-5", "null", "2147483647"]
    codes = set()
    for text in garbled([valid], words, max(1, NUMBER // 10)):
        path.write_bytes(text)
        codes.add(main([*arguments]))
    assert codes == {0, 2}
