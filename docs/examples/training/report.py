"""What a run shows: a progress bar or plain lines on rank 0, a plot of the loss."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time

from matplotlib.figure import Figure
from tqdm import tqdm


class Progress:
    """Loss, gradient norm and speed of each step; a bar on a terminal, one line every few steps elsewhere."""

    def __init__(self, total: int, done: int, tokens_per_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.tokens_per_step = tokens_per_step
        self.every = max(1, total // 20)
        self.total = total
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not enabled or not sys.stderr.isatty())
        self.clock = time.perf_counter()

    def update(self, step: int, loss: float, norm: float) -> None:
        now = time.perf_counter()
        speed, self.clock = self.tokens_per_step / (now - self.clock), now
        if not self.enabled:
            return
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.4f}, norm {norm:.3f}, {speed:,.0f} tokens/s")
            self.bar.update()
        elif (step + 1) % self.every == 0 or step + 1 == self.total:
            print(f"step {step + 1:5d}  loss {loss:.6f}  norm {norm:.4f}  {speed:,.0f} tokens/s", flush=True)

    def close(self) -> None:
        self.bar.close()


class LossLog:
    """`losses.txt`: the loss of each step on a line of its own, as exact as it was, from the first step of the run on.

    Args:
        done: the step that the run continues after; lines after it, of steps that will be made again, are dropped.
        enabled: on the one rank that writes.
    """

    def __init__(self, path: pathlib.Path, done: int, enabled: bool) -> None:
        self.file = None
        self.losses: list[float] = []
        if not enabled:
            return
        if done and path.is_file():
            self.losses = [float(line) for line in path.read_text().splitlines()[:done]]
        self.losses += [math.nan] * (done - len(self.losses))  # the log was lost, the checkpoint was not
        path.write_text("".join(f"{loss!r}\n" for loss in self.losses))
        self.file = path.open("a")

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        if self.file:
            self.file.write(f"{loss!r}\n")
            self.file.flush()

    def make_durable(self) -> None:
        """Before a checkpoint that will rely on these lines."""
        if self.file:
            os.fsync(self.file.fileno())


def plot_loss(path: str, losses: list[float], entropy: float, single: list[float], title: str, unit: str) -> None:
    """The loss, beside the text's unigram entropy and, of the last steps, the single process's."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, 1 + len(losses))
    axes.plot(steps, losses, label="in parallel", linewidth=2)
    if single:
        axes.plot(steps[-len(single) :], single, "--", color="black", linewidth=1, label="one process")
    axes.axhline(entropy, color="grey", linestyle=":", label=f"unigram entropy of the text, {entropy:.2f}")
    axes.set(xlabel="step", ylabel=f"loss, nats per {unit}", title=title, ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
