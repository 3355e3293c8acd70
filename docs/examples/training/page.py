"""`report.html`: what a run did, on one page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
import pathlib
import statistics

from matplotlib.figure import Figure

from training.report import COLOR, running_mean

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "img{max-width:100%}table{border-collapse:collapse}td,th{padding:.2rem .8rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}tr{border-bottom:1px solid #ddd}"
)


def write_report(
    folder: pathlib.Path,
    title: str,
    facts: dict[str, str],
    of_ranks: dict[str, list[float]],
    norms: list[float],
    speeds: list[float],
) -> pathlib.Path:
    """Write the page into a run's folder, with the pictures that are there.

    Args:
        facts: what is said in words, by name.
        of_ranks: numbers of every rank, by name.
        norms: of the gradients, of each step.
        speeds: tokens per second, of each step.
    """
    pictures = [folder / name for name in ("loss.png", "timeline.png", "load.png") if (folder / name).exists()]
    page = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"]
    page += [f"<h1>{html.escape(title)}</h1>", _table([["", ""], *([n, v] for n, v in facts.items())])]
    page += [_picture(picture.read_bytes()) for picture in pictures[:1]]
    page += [_picture(_steps(norms, speeds)), "<h2>Ranks</h2>"]
    rows = zip(*of_ranks.values(), strict=True)
    page += [_table([["rank", *of_ranks], *([str(r), *(f"{v:,.1f}" for v in row)] for r, row in enumerate(rows))])]
    page += [_picture(picture.read_bytes()) for picture in pictures[1:]]
    path = folder / "report.html"
    path.write_text("\n".join(page))
    return path


def typical(speeds: list[float]) -> float:
    """The median without the first step, in which everything is made for the first time."""
    return statistics.median(speeds[1:] or speeds)


def _steps(norms: list[float], speeds: list[float]) -> bytes:
    figure = Figure(figsize=(8, 2.8), dpi=120, layout="constrained")
    for axes, values, name in zip(
        figure.subplots(1, 2), (norms, speeds), ("norm of the gradients", "tokens per second"), strict=True
    ):
        steps = range(1, 1 + len(values))
        axes.plot(steps, values, color=COLOR, alpha=0.35, linewidth=1)
        axes.plot(steps, running_mean(values), color=COLOR, linewidth=2)
        axes.set(xlabel="step of this start", title=name, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _picture(png: bytes) -> str:
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(rows: list[list[str]]) -> str:
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["".join(f"<th>{cell}" for cell in head)] if any(head) else []
    lines += ["".join(f"<td>{cell}" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}" for line in lines) + "</table>"
