"""The report's figures as PNG files, for papers: loss, who won, share over time, specialisation step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .content import LOG_SCALE_FROM, curve
from .routing_content import grid, routing_content
from .runs import RoutingLog, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "text.parse_math": False,  # names of runs and modules are no formulas
}
_TWO_SIDED = ("#2f6690", "#f1efea", "#c4572f")
_EARLY_TO_LATE = ("#2f6690", "#d9d6cf")


def write_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``loss.png``, and for every run that routes ``NAME-won.png``, ``-share.png`` and ``-specialised.png``.

    Returns:
        The files, in order.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written: list[Path] = []

    def draw(name: str, width: float, height: float, fill: Any, *arguments: Any) -> None:
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure.subplots(), *arguments)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        if any("loss" in entry for run in runs for entry in run.history):
            draw("loss", 3.4, 2.4, _loss, runs)
        for run in runs:
            if run.routing is not None:
                name, shown = re.sub(r"[^\w.-]+", "-", run.name), routing_content(run.routing)
                height = max(1.8, 0.9 + 0.17 * len(shown["layers"]))
                draw(f"{name}-won", 3.4, height, _won, run.routing, shown)
                draw(f"{name}-share", 3.4, 2.4, _share, shown)
                draw(f"{name}-specialised", 3.4, height, _specialised, run.routing, shown)
    return written


def _loss(axes: Axes, runs: Sequence[Run]) -> None:
    losses: list[float] = []
    for run in runs:
        points = curve(run.history)
        if points["steps"]:
            axes.plot(points["steps"], points["loss"], label=run.name, linewidth=1)
            losses += points["loss"]
    if losses and max(losses) > LOG_SCALE_FROM * min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.legend()


def _won(axes: Axes, log: RoutingLog, shown: dict[str, Any]) -> None:
    """The share of all steps that the first expert won, by layer and projection."""
    _heat_map(axes, log, shown["whole"][0], f"share won by {log.experts[0]}", _TWO_SIDED, (0.0, 1.0))


def _specialised(axes: Axes, log: RoutingLog, shown: dict[str, Any]) -> None:
    steps = [None if step < 0 else step for step in shown["specialised"]]
    _heat_map(axes, log, steps, "winner kept from step", _EARLY_TO_LATE, (shown["first_step"], shown["last_step"]))


def _heat_map(
    axes: Axes,
    log: RoutingLog,
    values: Sequence[float | None],
    label: str,
    colors: Sequence[str],
    limits: tuple[float, float],
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    layers, projections, cells = grid(log.modules)
    table = np.full((len(layers), len(projections)), np.nan)
    for cell, value in zip(cells, values, strict=True):
        table[cell] = np.nan if value is None else value
    scale = LinearSegmentedColormap.from_list(label, colors)
    image = axes.imshow(table, cmap=scale, vmin=limits[0], vmax=limits[1], aspect="auto")
    axes.set_xticks(range(len(projections)), projections, rotation=35, ha="right")
    every = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), every), ["-" if layer is None else str(layer) for layer in layers[::every]])
    axes.set_ylabel("layer")
    axes.figure.colorbar(image, ax=axes, label=label)


def _share(axes: Axes, shown: dict[str, Any]) -> None:
    middles = [(first + last) / 2 for first, last in shown["line_windows"]]
    last = len(shown["projections"]) - 1
    for i, (projection, line) in enumerate(zip(shown["projections"], shown["line_shares"][0], strict=True)):
        width = min(4.0, 1 + 0.6 * (last - i))  # lines that lie on one another show as bands
        axes.plot(middles, [np.nan if y is None else y for y in line], label=projection, linewidth=width)
    axes.set(xlabel="step", ylabel=f"share won by {shown['experts'][0]}", ylim=(-0.03, 1.03))
    axes.figure.legend(loc="outside upper center", fontsize=6, ncols=4)
