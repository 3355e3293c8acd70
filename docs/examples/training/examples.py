"""Texts and chats of a JSONL file as rows of tokens, with labels on what the model is to learn to write."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100  # a label that is not counted


class Piece(NamedTuple):
    """Tokens, and for each whether it is to be learned."""

    tokens: list[int]
    learned: list[bool]


class Examples:
    """What a file holds, tokenised, in memory.

    A line is `{"text": …}`, of which everything is learned; `{"messages": [{"role": …, "content": …}, …]}`, of which
    what the assistant says is, with `"tools"` beside them for a template that writes those; or `{"prompt": …,
    "completion": …}`. A file that is not called `.jsonl` is one text.

    Args:
        path: of the file.
        tokenizer: a fast one of transformers; with a chat template where there are messages.
        seq_len: tokens of a row. Longer texts go on in another row; longer chats are cut.
        packed: put several into a row; `position_ids` then begin anew with each, which keeps them apart. Else a row is
            one of them, padded on the right, where nothing that is learned can see the padding.

    Raises:
        ValueError: a line that is none of these, by its number; no chat template; a slow tokenizer; nothing to learn.
    """

    def __init__(self, path: str, tokenizer: Any, seq_len: int, packed: bool = False) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not say where its tokens are; use a fast tokenizer")
        self.tokenizer, self.seq_len, self.packed = tokenizer, seq_len, packed
        content = pathlib.Path(path).read_bytes()
        found, self.cut = [], 0
        for number, line in lines_of(path, content):
            found += self._pieces(line, f"line {number} of {path}")
        pieces = [piece for piece in found if any(piece.learned[1:])]
        if not pieces:
            raise ValueError(f"{path} has nothing to learn in {seq_len} tokens")
        rows = _pack(pieces, seq_len) if packed else [[piece] for piece in pieces]
        self.ids, self.labels, self.positions = (torch.stack(t) for t in zip(*map(self._row, rows), strict=True))
        shortened = f", {self.cut:,} cut" if self.cut else ""
        empty = len(found) - len(pieces)
        left_out = f", {empty:,} left out with nothing to learn in {seq_len} tokens" if empty else ""
        self.source = f"{len(pieces):,} pieces of {path} in {len(rows):,} rows{shortened}{left_out}"
        self._digest = int(hashlib.sha256(content + self.ids.numpy().tobytes()).hexdigest()[:15], 16)

    def check(self, seq_len: int) -> None:
        """There is something to learn; found when the file was read."""

    def batch(
        self, sequences: int, seq_len: int, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Ids, labels (the next token, or IGNORED) and other inputs of a step, `(sequences, seq_len)` each.

        Every row comes once before any comes again, in an order that depends on the seed; the same on every rank.
        """
        places = range(step * sequences, (step + 1) * sequences)
        number = len(self.ids)
        rows = [int(order_of_rows(number, seed, place // number)[place % number]) for place in places]
        more = {"position_ids": self.positions[rows]} if self.packed else {}
        return self.ids[rows], self.labels[rows], more

    def every_row(self, sequences: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """Batches of all rows, once each; the last is filled up with rows whose labels are not counted."""
        for start in range(0, len(self.ids), sequences):
            rows = torch.arange(start, start + sequences)
            labels = torch.where((rows < len(self.ids))[:, None], self.labels[rows % len(self.ids)], IGNORED)
            more = {"position_ids": self.positions[rows % len(self.ids)]} if self.packed else {}
            yield self.ids[rows % len(self.ids)], labels, more

    def with_other_neighbours(self, sequences: int) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """Two batches that differ in the first text of one packed row, and count the labels of the texts behind it.

        A model that keeps texts apart has the same loss on both. Empty where no row holds two.
        """
        begins = (self.positions == 0) & (torch.arange(self.seq_len) > 0)
        later = begins.int().cumsum(1) > 0
        rows = (later & (self.labels != IGNORED)).any(1).nonzero()
        if not len(rows):
            return []
        row = int(rows[0])
        ids, positions = (t[row].repeat(sequences, 1) for t in (self.ids, self.positions))
        labels = torch.full_like(ids, IGNORED)
        labels[0] = torch.where(later[row], self.labels[row], IGNORED)
        others = ids.clone()
        others[0, ~later[row]] = others[0, ~later[row]].flip(0)
        return [(each, labels, {"position_ids": positions}) for each in (ids, others)]

    def unigram_entropy(self) -> float:
        """Nats per token of a model that knows nothing but how often each token is to be written."""
        p = torch.bincount(self.labels[self.labels != IGNORED]).double()
        p = p[p > 0] / p.sum()
        return float(-(p * p.log()).sum())

    def digest(self) -> int:
        """A number that differs between files and tokenizers, to notice ranks that read different ones."""
        return self._digest

    def _pieces(self, line: Any, where: str) -> Iterator[Piece]:
        if isinstance(line, dict) and isinstance(line.get("text"), str):
            tokens = self._with_end(self.tokenizer(line["text"]).input_ids)
            for start in range(0, max(1, len(tokens) - 1), self.seq_len):
                part = tokens[start : start + self.seq_len + 1]
                yield Piece(part, [True] * len(part))
            return
        if isinstance(line, dict) and isinstance(line.get("messages"), list):
            piece = self._chat(line["messages"], line.get("tools"), where)
        elif isinstance(line, dict) and all(isinstance(line.get(name), str) for name in ("prompt", "completion")):
            prompt = self.tokenizer(line["prompt"]).input_ids
            answer = self._with_end(self.tokenizer(line["completion"], add_special_tokens=False).input_ids)
            piece = Piece(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        else:
            raise ValueError(f'{where} has neither "text", "messages", nor "prompt" and "completion"')
        self.cut += len(piece.tokens) > self.seq_len + 1
        yield Piece(piece.tokens[: self.seq_len + 1], piece.learned[: self.seq_len + 1])

    def _chat(self, messages: list[dict], tools: list | None, where: str) -> Piece:
        """What an assistant says is what the template adds to what was there when it was asked to speak."""
        write = functools.partial(self.tokenizer.apply_chat_template, tools=tools, tokenize=False)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{where} is a chat, and the tokenizer has no chat template")
        try:
            whole = write(messages)
            said = []
            for place, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = write(messages[:place], add_generation_prompt=True)
                    after = write(messages[: place + 1])
                    if not (whole.startswith(after) and after.startswith(before)):
                        raise ValueError("the template writes a message differently when another follows")
                    said.append((len(before), len(after)))
        except Exception as error:  # of the template's own language, too
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded.offset_mapping
        learned = [any(first <= a and b <= last and a < b for first, last in said) for a, b in places]
        return Piece(encoded.input_ids, learned)

    def _with_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]

    def _row(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokenizer, ids, labels, positions = self.tokenizer, [], [], []
        for tokens, learned in pieces:
            ids += tokens[:-1]
            labels += [token if wanted else IGNORED for token, wanted in zip(tokens[1:], learned[1:], strict=True)]
            positions += range(len(tokens) - 1)
        filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        rest = self.seq_len - len(ids)
        row = ids + [filler] * rest, labels + [IGNORED] * rest, [*positions, *range(rest)]
        return tuple(map(torch.tensor, row))


@functools.lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def order_of_rows(rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def lines_of(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line of a JSONL file, or all of another file as one text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from None
    if not path.endswith(".jsonl"):
        yield 1, {"text": text}
        return
    for number, line in enumerate(text.split("\n"), 1):  # a string in JSON may hold other ends of lines
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error}") from None


def _pack(pieces: Sequence[Piece], seq_len: int) -> list[list[Piece]]:
    """Rows of pieces in their order; one that no longer fits begins the next row."""
    rows: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        length = len(piece.tokens) - 1
        if length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(piece)
        room -= length
    return rows
