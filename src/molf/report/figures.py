"""The report's figures as PNG files, for papers: loss, score, who won, share over time, specialisation step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .content import LOG_SCALE_FROM, curve, evaluations
from .routing_content import grid, routing_content
from .runs import RoutingLog, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "savefig.dpi": 300,
    "text.parse_math": False,  # names of runs and modules are no formulas
}
_RUNS = ("#2f6690", "#c4572f", "#3c8562", "#87539b", "#a67c12", "#4a5fb8", "#b03a5b", "#5c6b73")
_TWO_SIDED = ("#2f6690", "#f1efea", "#c4572f")
_EARLY_TO_LATE = ("#2f6690", "#d9d6cf")
_LABELS = {"steps": "step", "seconds": "seconds of training"}


def write_figures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write ``loss.png``, and for every run that routes ``NAME-won.png``, ``-share.png`` and ``-specialised.png``.

    ``loss-time.png`` is over seconds; ``score.png`` and ``score-time.png`` are written where a run was scored while
    training went on.

    Returns:
        The files, in order.
    """
    import matplotlib
    from cycler import cycler
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
    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=_RUNS)}):
        for axis, suffix in (("steps", ""), ("seconds", "-time")):
            if any(curve(run.history)[axis] for run in runs):
                draw(f"loss{suffix}", 3.4, 2.4, _loss, runs, axis)
            if any(_scored(run) for run in runs):
                draw(f"score{suffix}", 3.4, 2.4, _score, runs, axis)
        for run, name in zip(runs, _file_names(runs), strict=True):
            if run.routing is not None:
                shown = routing_content(run.routing)
                height = max(1.8, 0.9 + 0.17 * len(shown["layers"]))
                draw(f"{name}-won", 3.4, height, _won, run.routing, shown)
                draw(f"{name}-share", 3.4, max(1.4, 0.9 + 0.17 * len(shown["projections"])), _share, shown)
                draw(f"{name}-specialised", 3.4, height, _specialised, run.routing, shown)
    return written


def _file_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names as files may have them, numbered where they are alike."""
    names = [re.sub(r"[^\w.-]+", "-", run.name) for run in runs]
    alike = {index for index, name in enumerate(names) if names.count(name) > 1}
    taken = set(names)
    for index in sorted(alike):
        numbered = (f"{names[index]}-{number}" for number in count(index + 1))
        names[index] = next(name for name in numbered if name not in taken)
        taken.add(names[index])
    return names


def _legend(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Of these lines: by itself matplotlib leaves out those whose name begins with _."""
    axes.legend(lines, [str(line.get_label()) for line in lines])


def _loss(axes: Axes, runs: Sequence[Run], axis: str) -> None:
    losses: list[float] = []
    named: list[Line2D] = []
    for index, run in enumerate(runs):
        points, evaluated = curve(run.history), evaluations(run)
        if points[axis]:
            named += axes.plot(points[axis], points["loss"], label=run.name, linewidth=1, color=f"C{index}")
            losses += points["loss"]
        if evaluated[axis]:
            axes.plot(evaluated[axis], evaluated["loss"], "o:", linewidth=0.8, markersize=2, color=f"C{index}")
            losses += evaluated["loss"]
    if losses and max(losses) > LOG_SCALE_FROM * min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own is a formula
        axes.yaxis.set_minor_formatter("")
    if any(evaluations(run)[axis] for run in runs):
        named += axes.plot([], [], "o:", linewidth=0.8, markersize=2, color="black", label="evaluation")
    axes.set(xlabel=_LABELS[axis], ylabel="loss (nats per token)")
    _legend(axes, named)


def _scored(run: Run) -> bool:
    return any(value is not None for value in evaluations(run)["score"])


def _score(axes: Axes, runs: Sequence[Run], axis: str) -> None:
    """Scores while training went on; the final ones are of other records and not in it."""
    named: list[Line2D] = []
    for index, run in enumerate(runs):
        if _scored(run):
            found = evaluations(run)
            scores = [np.nan if value is None else value for value in found["score"]]
            style: dict[str, Any] = {"linewidth": 1, "markersize": 2.5, "color": f"C{index}"}
            named += axes.plot(found[axis], scores, "o-", label=run.name, **style)
    counts = {evaluations(run)["records"] for run in runs if _scored(run)}
    of = f" of {counts.pop()} records" if len(counts) == 1 else ""
    axes.set(xlabel=_LABELS[axis], ylabel=f"score{of}")
    _legend(axes, named)


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
    layers, projections, cells = grid(log.modules)
    table = np.full((len(layers), len(projections)), np.nan)
    for cell, value in zip(cells, values, strict=True):
        table[cell] = np.nan if value is None else value
    _image(axes, table, label, colors, limits)
    axes.set_xticks(range(len(projections)), projections, rotation=35, ha="right")
    every = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), every), ["-" if layer is None else str(layer) for layer in layers[::every]])
    axes.set_ylabel("layer")
    axes.vlines(np.arange(len(projections) - 1) + 0.5, -0.5, len(layers) - 0.5, colors="white", linewidth=0.8)
    axes.hlines(np.arange(len(layers) - 1) + 0.5, -0.5, len(projections) - 0.5, colors="white", linewidth=0.8)


def _image(
    axes: Axes, table: np.ndarray, label: str, colors: Sequence[str], limits: tuple[float, float], **options: Any
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list(label, colors)
    image = axes.imshow(table, cmap=scale, vmin=limits[0], vmax=limits[1], aspect="auto", **options)
    axes.figure.colorbar(image, ax=axes, label=label)


def _share(axes: Axes, shown: dict[str, Any]) -> None:
    """A strip per projection; lines would lie on one another."""
    names, height = shown["projections"], len(shown["projections"])
    table = np.array(shown["projection_shares"][0], dtype=float)  # None is nan
    extent = (shown["first_step"] - 0.5, shown["last_step"] + 0.5, height - 0.5, -0.5)
    label = f"share won by {shown['experts'][0]}"
    _image(axes, table, label, _TWO_SIDED, (0.0, 1.0), extent=extent, interpolation="nearest")
    axes.set_yticks(range(height), names)
    axes.hlines(np.arange(height - 1) + 0.5, *extent[:2], colors="white", linewidth=1.5)
    axes.set_xlabel("step")
