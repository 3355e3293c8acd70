"""Real text as bytes: one token per byte, random windows that depend on the seed and the step alone."""

from __future__ import annotations

import pathlib
import sysconfig

import torch

VOCABULARY = 256


class ByteText:
    """The text of some files, in memory.

    Args:
        path: a text file, a folder whose files are read in order of their names, or None for the Python standard
            library's own source files.
    """

    def __init__(self, path: str | None = None, limit: int = 8_000_000) -> None:
        files = _files(path)
        data = bytearray()
        for file in files:
            data += file.read_bytes()
            if len(data) >= limit:
                break
        self.tokens = torch.frombuffer(data[:limit], dtype=torch.uint8)
        self.source = f"{len(self.tokens):,} bytes of {path or 'the Python standard library'}"

    def check(self, seq_len: int) -> None:
        if len(self.tokens) <= seq_len + 1:
            raise ValueError(f"--text has {len(self.tokens)} bytes, too few for --seq-len {seq_len}")

    def batch(
        self, sequences: int, seq_len: int, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Ids and next-byte labels of a step, `(sequences, seq_len)` int64, the same on every rank; no more inputs."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(0, len(self.tokens) - seq_len - 1, (sequences, 1), generator=generator)
        windows = self.tokens[starts + torch.arange(seq_len + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), {}

    def unigram_entropy(self) -> float:
        """Nats per byte of a model that knows nothing but how often each byte occurs."""
        p = torch.bincount(self.tokens.long(), minlength=VOCABULARY).double()
        p = p[p > 0] / p.sum()
        return float(-(p * p.log()).sum())

    def digest(self) -> int:
        """A number that differs between texts, to notice ranks that read different files."""
        places = torch.arange(len(self.tokens), dtype=torch.int64) % 65_521
        return int((self.tokens.long() * (places + 1)).sum())


def _files(path: str | None) -> list[pathlib.Path]:
    if path is None:
        return sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else []
    if not files:
        raise ValueError(f"--text {path!r} is neither a file nor a folder with files")
    return files
