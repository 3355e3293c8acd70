"""Draw the pictures that need no training run: `python docs/images/draw.py`; needs matplotlib."""

from __future__ import annotations

import pathlib

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from am_moe.context_parallel import Kind, Plan, Rule, head_tail
from am_pipeline import plot_timeline, schedule_order, simulate

FOLDER = pathlib.Path(__file__).parent
RANKS = 4
SEQ_LEN = 64
COLORS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52"]


def main() -> None:
    contiguous = tuple(((rank * SEQ_LEN // RANKS, (rank + 1) * SEQ_LEN // RANKS),) for rank in range(RANKS))
    draw_context(contiguous, head_tail(SEQ_LEN, RANKS), FOLDER / "context-chunks.png")
    events = simulate(schedule_order("1F1B", ranks=RANKS, microbatches=8))
    plot_timeline(events, str(FOLDER / "schedule-1f1b.png"), "1F1B, 8 microbatches", unit="units of a forward")


def draw_context(contiguous: tuple, chunks: tuple, path: pathlib.Path) -> None:
    """Which rank computes which scores of causal attention, for two layouts of the sequence."""
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    for axes, layout, title in zip(
        figure.subplots(1, 2), (contiguous, chunks), ("one chunk for each rank", "a chunk from the head, one from the tail"),
        strict=True,
    ):
        owner = [[-1] * SEQ_LEN for _ in range(SEQ_LEN)]
        scores = [0] * RANKS
        for rank, query, key in computed(Plan(layout, Rule())):
            owner[query][key] = rank
            scores[rank] += 1
        axes.imshow(owner, cmap=ListedColormap(["white", *COLORS]), vmin=-1, vmax=RANKS - 1)
        axes.set(title=f"{title}\nbusiest rank {max(scores) / (sum(scores) / RANKS):.2f} x mean", xlabel="key", ylabel="query")
        axes.set_xticks([])
        axes.set_yticks([])
    patches = [Patch(color=color, label=f"rank {rank}") for rank, color in enumerate(COLORS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=RANKS, frameon=False)
    figure.savefig(path)


def computed(plan: Plan):
    """Every score that a rank computes, as (rank, query, key)."""
    for rank in range(RANKS):
        for source in range(RANKS):
            for block in plan.blocks(rank, source):
                for query in range(*block.queries):
                    for key in range(*block.keys):
                        if block.kind is Kind.FULL or key <= query:
                            yield rank, query, key


if __name__ == "__main__":
    main()
