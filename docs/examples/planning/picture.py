"""A step of a layout as a picture: the schedule of the stages, or what follows what on a rank without stages."""

from __future__ import annotations

import pathlib

from am_pipeline.schedule.timeline import plot_timeline
from planning.report import AXES
from planning.search import Found

_COLOURS = {"forward and backward": (0.33, 0.55, 0.85), "update": (0.35, 0.70, 0.45)}
_WAITING = (0.85, 0.45, 0.33)


def draw(found: Found, path: pathlib.Path, title: str) -> None:
    """Write the picture of a step; its ending decides the format. Needs matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.time.events:
        plot_timeline(list(found.time.events), str(path), title)
        return
    from matplotlib.figure import Figure

    time = found.time
    pieces = [("forward and backward", time.compute)]
    pieces += [(f"waiting for {AXES[axis]} messages", waits) for axis, waits in time.exposed.items() if waits]
    pieces += [("update", time.optimizer)]
    figure = Figure(figsize=(12, 2.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    start = 0.0
    for name, seconds in pieces:
        label = f"{name} {1e3 * seconds:.1f} ms"
        axes.broken_barh(
            [(1e3 * start, 1e3 * seconds)], (-0.4, 0.8), color=_COLOURS.get(name, _WAITING), ec="white", label=label
        )
        start += seconds
    axes.set_yticks([0], ["every rank"])
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=len(pieces))
    figure.savefig(path)
