"""Draw the load of experts."""

from __future__ import annotations

import torch


def plot_load(totals: dict[str, torch.Tensor], path: str, title: str = "", ranks: int = 1) -> None:
    """A heat map: a row for each layer, a column for each expert, coloured by its load over the layer's mean.

    Needs matplotlib (`pip install am-moe[plot]`).

    Args:
        totals: from `ExpertLoad.total`: for each experts module the choices of each of its experts, `(E,)`.
        path: where the picture goes; the ending decides the format.
        title: printed above it.
        ranks: the size of the expert axis, to draw the borders between ranks.

    Raises:
        ValueError: there is nothing to draw, or layers have different numbers of experts.
        ImportError: matplotlib is not installed.
    """
    sizes = {len(counts) for counts in totals.values()}
    if len(sizes) != 1 or not sum(int(c.sum()) for c in totals.values()):
        raise ValueError(f"a picture needs some choices, and layers with as many experts each; got {sorted(sizes)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_load needs matplotlib: pip install am-moe[plot]") from error

    counts_LE = torch.stack([counts.double().cpu() for counts in totals.values()])
    relative_LE = counts_LE / counts_LE.mean(-1, keepdim=True).clamp(min=1e-30)
    layers, experts = relative_LE.shape
    figure = Figure(figsize=(2 + min(12, 0.25 * experts + 3), 1.5 + 0.3 * layers), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(relative_LE.tolist(), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    for border in range(1, ranks):
        axes.axvline(border * experts / ranks - 0.5, color="black", linewidth=1)
    axes.set_yticks(range(layers), [_short(name) for name in totals])
    axes.set_xlabel(f"expert, over {ranks} ranks" if ranks > 1 else "expert")
    axes.set_title(f"{title}  busiest expert {relative_LE.max():.2f} x mean".strip())
    figure.colorbar(image, ax=axes, label="load over the layer's mean", extend="max")
    figure.savefig(path)


def _short(name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if numbers else name
