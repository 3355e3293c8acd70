"""Chats with images of a JSONL file, made into a model's inputs by the processor of its folder."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from training.examples import IGNORED, lines_of, order_of_rows


class Chat(NamedTuple):
    """A chat as the template writes it, its images, its tokens with those of images, and whether they are learned."""

    text: str
    images: list[pathlib.Path]
    tokens: list[int]
    learned: list[bool]


class ImageChats:
    """What a file of chats holds; images are read when their rows come.

    A line is `{"messages": [{"role": …, "content": …}, …]}`. A content is a text, or a list of `{"type": "text",
    "text": …}` and `{"type": "image", "path": …}`, whose path is one beside the file. What the assistant says is
    learned. A row is one chat, padded on the right, where nothing that is learned can see the padding.

    Args:
        path: of the file.
        processor: of the folder, by `AutoProcessor`.
        seq_len: tokens of a row. A longer chat is refused: cut, it could lose a part of an image.

    Raises:
        ValueError: a line that is no chat or too long, by its number; an image that cannot be read; no processor for
            images, or no chat template; nothing to learn.
    """

    def __init__(self, path: str, processor: Any, seq_len: int) -> None:
        if not hasattr(processor, "image_processor"):
            raise ValueError(f"--images: the folder has no processor of images, only a {type(processor).__name__}")
        if not getattr(processor, "chat_template", None):
            raise ValueError("--images: the folder's processor has no chat template")
        self.processor, self.seq_len = processor, seq_len
        processor.tokenizer.padding_side = "right"
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        content = pathlib.Path(path).read_bytes()
        self.chats, read = [], hashlib.sha256(content)
        for number, line in lines_of(path, content):
            self.chats.append(self._chat(line, pathlib.Path(path).parent, f"line {number} of {path}"))
            for image in self.chats[-1].images:
                read.update(image.read_bytes())
        self.chats = [chat for chat in self.chats if any(chat.learned[1:])]
        if not self.chats:
            raise ValueError(f"{path} has nothing to learn in {seq_len} tokens")
        self._digest = int(read.hexdigest()[:15], 16)
        number = sum(len(chat.images) for chat in self.chats)
        self.source = f"{len(self.chats):,} chats of {path} with {number:,} images"

    def check(self, seq_len: int) -> None:
        """There is something to learn; found when the file was read."""

    def batch(self, sequences: int, seq_len: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Ids and labels of a step, `(sequences, seq_len)` each, and a function from a slice of rows to their inputs.

        Every row comes once before any comes again, in an order that depends on the seed; the same on every rank.
        """
        places = range(step * sequences, (step + 1) * sequences)
        number = len(self.chats)
        return self._rows([int(order_of_rows(number, seed, place // number)[place % number]) for place in places])

    def every_row(self, sequences: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
        """Batches of all rows, once each; the last is filled up with rows whose labels are not counted."""
        number = len(self.chats)
        for start in range(0, number, sequences):
            ids, labels, inputs = self._rows([row % number for row in range(start, start + sequences)])
            labels[number - start :] = IGNORED
            yield ids, labels, inputs

    def unigram_entropy(self) -> float:
        """Nats per token of a model that knows nothing but how often each token is to be written."""
        labels = torch.cat([labels.flatten() for _, labels, _ in self.every_row(16)])
        p = torch.bincount(labels[labels != IGNORED]).double()
        p = p[p > 0] / p.sum()
        return float(-(p * p.log()).sum())

    def digest(self) -> int:
        """A number that differs between files, to notice ranks that read different ones; of the images too."""
        return self._digest

    def _rows(self, places: list[int]) -> tuple[torch.Tensor, torch.Tensor, Any]:
        chats = [self.chats[place] for place in places]
        tokens = torch.full((len(chats), self.seq_len + 1), self.processor.tokenizer.pad_token_id)
        labels = torch.full_like(tokens, IGNORED)
        for row, chat in enumerate(chats):
            tokens[row, : len(chat.tokens)] = torch.tensor(chat.tokens)
            learned = torch.tensor(chat.learned).nonzero()[:, 0]
            labels[row, learned] = tokens[row, learned]
        return tokens[:, :-1].contiguous(), labels[:, 1:].contiguous(), functools.partial(self._inputs, chats, tokens)

    def _inputs(self, chats: list[Chat], tokens: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
        """What the processor makes of some rows, but for ids, and for a mask of padding, which nothing learned sees.

        Raises:
            ValueError: the processor gives a chat other tokens beside others than by itself.
        """
        given = self._processed([(chat.text, chat.images) for chat in chats[rows]], self.seq_len + 1)
        ids = given.pop("input_ids")
        if not ids.equal(tokens[rows]):
            raise ValueError(f"{type(self.processor).__name__} writes a chat otherwise when others are in its batch")
        given.pop("attention_mask", None)
        return {n: value[:, :-1].contiguous() if value.shape == ids.shape else value for n, value in given.items()}

    def _processed(self, chats: list[tuple[str, list[pathlib.Path]]], length: int | None) -> dict[str, torch.Tensor]:
        from PIL import Image

        images = [[Image.open(path).convert("RGB") for path in paths] for _, paths in chats]
        padding = {"padding": "max_length", "max_length": length} if length else {}
        settings = {"add_special_tokens": False, "return_tensors": "pt"} | padding
        return dict(
            self.processor(text=[text for text, _ in chats], images=images if any(images) else None, **settings)
        )

    def _chat(self, line: Any, folder: pathlib.Path, where: str) -> Chat:
        """What an assistant says is what the template adds to what was there when it was asked to speak."""
        if not isinstance(line, dict) or not isinstance(line.get("messages"), list):
            raise ValueError(f'{where} has no "messages"; with --images a line is a chat')
        try:
            messages, images = zip(*(_content(message, folder) for message in line["messages"]), strict=True)
            whole = self._tokens(messages, images, False)
            learned = [False] * len(whole)
            for place, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self._tokens(messages[:place], images[:place], True)
                    after = self._tokens(messages[: place + 1], images[: place + 1], False)
                    if whole[: len(after)] != after or after[: len(before)] != before:
                        raise ValueError(
                            "the template, or its tokens, write a message differently when another follows"
                        )
                    learned[len(before) : len(after)] = [True] * (len(after) - len(before))
            text = self.processor.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # of the template's own language and of images, too
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
        if len(whole) > self.seq_len + 1:
            raise ValueError(
                f"{where} has {len(whole)} tokens with its images, more than --seq-len {self.seq_len} takes; give "
                f"--seq-len {len(whole) - 1} or smaller images"
            )
        return Chat(text, [image for some in images for image in some], whole, learned)

    def _tokens(self, messages: Any, images: Any, asked: bool) -> list[int]:
        if not messages:
            return []
        text = self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asked)
        return self._processed([(text, [image for some in images for image in some])], None)["input_ids"][0].tolist()


def _content(message: dict, folder: pathlib.Path) -> tuple[dict, list[pathlib.Path]]:
    """A message as templates of processors take it, and its images."""
    given, content, images = message["content"], [], []
    for item in [{"type": "text", "text": given}] if isinstance(given, str) else given:
        if item["type"] == "image":
            images.append(folder / (item.get("path") or item["image"]))
            content.append({"type": "image"})
        elif item["type"] == "text":
            content.append({"type": "text", "text": item["text"]})
        else:
            raise ValueError(f"a content of type {item['type']!r}; it can be text or image")
    if images and message["role"] == "assistant":
        raise ValueError("the assistant learns to write text; an image is the user's")
    return {"role": message["role"], "content": content}, images
