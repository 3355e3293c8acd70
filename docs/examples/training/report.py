"""What a run shows: a progress bar or plain lines on rank 0, a plot of the loss."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time

from matplotlib.figure import Figure
from tqdm import tqdm

COLOR = "#4c72b0"


class Progress:
    """Loss, gradient norm and speed of each step; a bar on a terminal, one line every few steps elsewhere."""

    def __init__(self, total: int, done: int, tokens_per_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.tokens_per_step = tokens_per_step
        self.every = max(1, total // 20)
        self.total = total
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not enabled or not sys.stderr.isatty())
        self.clock = time.perf_counter()
        self.norms: list[float] = []
        self.speeds: list[float] = []

    def update(self, step: int, loss: float, norm: float) -> None:
        now = time.perf_counter()
        speed, self.clock = self.tokens_per_step / (now - self.clock), now
        self.norms.append(norm)
        self.speeds.append(speed)
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
    """The loss of each step and its running mean, beside the text's unigram entropy.

    Beneath, where one process trained the last steps too, the relative difference to it.
    """
    figure = Figure(figsize=(8, 5.5 if single else 4.5), dpi=120, layout="constrained")
    axes, *beneath = figure.subplots(
        1 + bool(single), sharex=True, height_ratios=[3, 1][: 1 + bool(single)], squeeze=False
    ).flat
    steps = range(1, 1 + len(losses))
    axes.plot(steps, losses, color=COLOR, alpha=0.35, linewidth=1, label="each step")
    axes.plot(steps, running_mean(losses), color=COLOR, linewidth=2, label="running mean")
    known = [loss for loss in losses if math.isfinite(loss)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    if low - (high - low) / 2 < entropy < high:
        axes.axhline(entropy, color="grey", linestyle=":", label=f"unigram entropy of the text, {entropy:.2f}")
    axes.set(ylabel=f"loss, nats per {unit}", title=title)
    axes.legend(frameon=False)
    for panel in beneath:
        mine = losses[-len(single) :]
        panel.semilogy(
            steps[-len(single) :], [max(1e-9, abs(a - b) / abs(b)) for a, b in zip(mine, single, strict=True)]
        )
        panel.set(ylabel="difference to\none process", ylim=(1e-9, 1))
    for panel in (axes, *beneath):
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.01)
    (axes, *beneath)[-1].set_xlabel("step")
    figure.savefig(path)


def running_mean(values: list[float]) -> list[float]:
    """Of the tenth of the values around each, at least of three; what is not known is passed over."""
    reach = max(1, len(values) // 20)
    around = ([v for v in values[max(0, i - reach) : i + reach + 1] if math.isfinite(v)] for i in range(len(values)))
    return [sum(some) / len(some) if some else math.nan for some in around]
