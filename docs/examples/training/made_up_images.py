"""Rows of bytes with a made-up image in each, for a first look at a model of images and text."""

from __future__ import annotations

import functools
from typing import Any

import torch

from training.examples import IGNORED
from training.text import ByteText
from training.vision import image_token, kinds_of_tokens, one_image

BEFORE = 2  # tokens of text before an image


class MadeUpImages:
    """Text as bytes, and in every row an image of random pixels behind its first two bytes.

    Args:
        text: what the rows are taken from.
        model: takes the images; run once, on the CPU.

    Raises:
        ValueError: how the model takes images is not known.
    """

    def __init__(self, text: ByteText, model: Any) -> None:
        self.text, self.model = text, model
        self.image, self.tokens = one_image(model)
        self.source = f"{text.source}, an image of {self.tokens} tokens in every row"

    def check(self, seq_len: int) -> None:
        self.text.check(seq_len)
        if seq_len < self.tokens + 2 * BEFORE:
            raise ValueError(f"--seq-len {seq_len} has no room for an image of {self.tokens} tokens and some text")

    def batch(self, sequences: int, seq_len: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Ids, labels, `(sequences, seq_len)` each, and a function from a slice of rows to the inputs for these."""
        ids, labels, _ = self.text.batch(sequences, seq_len, seed, step)
        ids[:, BEFORE : BEFORE + self.tokens] = image_token(self.model.config)
        labels[:, BEFORE - 1 : BEFORE - 1 + self.tokens] = IGNORED
        return ids, labels, functools.partial(self._inputs, ids, seed, step)

    def unigram_entropy(self) -> float:
        return self.text.unigram_entropy()

    def digest(self) -> int:
        return self.text.digest()

    def _inputs(self, ids: torch.Tensor, seed: int, step: int, rows: slice) -> dict[str, torch.Tensor]:
        images = []
        for row in range(len(ids))[rows]:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 10_007 + row)
            pixels = torch.randn(self.image["pixel_values"].shape, generator=generator)
            images.append(self.image | {"pixel_values": pixels})
        joined = {name: torch.cat([image[name] for image in images]) for name in self.image}
        return joined | kinds_of_tokens(self.model, ids[rows])
