"""The report's plots as SVG text; each is a function of the report's data only."""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from tokmat_jax.evaluation.frontier import ALL_CURVES, SAMPLING, Point, front
from tokmat_jax.evaluation.passes import ALLOWED

_STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "svg.fonttype": "none", "svg.hashsalt": "tokmat", "legend.frameon": False,
}
_GREY = "#555555"
_COLOURS = ("#1b6ca8", _GREY, "#2e8b57", "#8e5ea2", "#d1495b", "#c98a00", "#3aa7a3", "#7a5c3e", "#e377c2",
            "#9aa81c", "#0b3c5d", "#f4845f", "#6a4c93", "#b5179e", "#588157", "#a98467", "#4cc9f0")
_MARKS = "os^Dv<>PXhp*"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def styled(draw: Callable[..., Figure]) -> Callable[..., str]:
    """Wraps `draw` to return SVG in the report's style, independent of other matplotlib settings of the process."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> str:
        with mpl.rc_context(_STYLE):
            return _svg(draw(*args, **kwargs))

    return wrapped


def plain(piece: str) -> str:
    """A token in a form that a plot can show: quoted, ASCII, and not read as mathematics."""
    return repr(piece).encode("ascii", "backslashreplace").decode().replace("$", r"\$")


@styled
def frontier(curves: dict[str, list[Point]], human: Point, baselines: dict[str, bool]) -> Figure:
    """Rep-3 against judge perplexity: a curve per method, the fronts of sampling and maturation, human as a point.

    `baselines` maps the names of the baseline's curves to whether the curve is sampling.
    """
    figure, axes = _figure(11, 5, 2)
    finite = [p for points in curves.values() for p in points if math.isfinite(p.repetition + p.perplexity)]
    for axis, near in zip(axes, (False, True), strict=True):
        for index, (name, points) in enumerate(curves.items()):
            ours = name not in baselines
            mark, colour = _MARKS[index % len(_MARKS)], _COLOURS[index % len(_COLOURS)]
            axis.plot([p.repetition for p in points], [p.perplexity for p in points], mark,
                      linestyle="-" if ours else "--", color=colour, markersize=4.5, linewidth=1.3,
                      label=name if ours else f"{name} (baseline)")
        families = ((SAMPLING, "#000000", [n for n, sampling in baselines.items() if sampling]),
                    ("maturation", "#d1495b", [name for name in curves if name not in baselines]))
        for family, colour, names in families:
            best = front([point for name in names for point in curves.get(name, [])])
            axis.plot([p.repetition for p in best], [p.perplexity for p in best], color=colour, linewidth=6, alpha=0.16,
                      label=f"best of {family}")
        axis.plot(human.repetition, human.perplexity, "*", color="#000000", markersize=15, label="human")
        axis.set(xlabel="repetition (Rep-3)", ylabel="judge perplexity", yscale="log")
        axis.set_title("around the human text" if near else "everything")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
        right = max(0.3, 3 * human.repetition)
        inside = [p.perplexity for p in [*finite, human] if p.repetition <= right]
        if near and inside:
            axis.set(xlim=(-0.02, right), ylim=(0.85 * min(inside), 1.15 * min(max(inside), 6 * human.perplexity)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


@styled
def passes(points: Sequence[dict[str, Any]]) -> Figure:
    """Tokens per pass against judge perplexity and repetition, a colour per curve. The dotted line is 5 % above the
    perplexity of one token a step."""
    figure, axes = _figure(10, 4, 2)
    for index, curve in enumerate(dict.fromkeys(point["curve"] for point in points)):
        chosen = [point for point in points if point["curve"] == curve]
        colour = _COLOURS[4 * index % len(_COLOURS)]
        for axis, name in zip(axes, ("perplexity", "rep_3"), strict=True):
            axis.plot([p["tokens_per_pass"] for p in chosen], [p[name] for p in chosen], _MARKS[index], color=colour,
                      label=curve)
        if math.isfinite(chosen[0]["perplexity"]):
            axes[0].axhline(ALLOWED * chosen[0]["perplexity"], color=colour, linestyle=":", linewidth=1)
    axes[0].set(xlabel="tokens per forward pass", ylabel="judge perplexity", yscale="log")
    for ticks in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    axes[1].set(xlabel="tokens per forward pass", ylabel="repetition (Rep-3)")
    axes[0].legend(fontsize=8)
    return figure


@styled
def entropy(data: dict[str, Any], temperatures: tuple[float, float]) -> Figure:
    """Entropy of chosen tokens from birth to commit, at the paper's temperature and at a sharper one."""
    figure, axes = _figure(10, 3.8, 2)
    for axis, name, temperature in zip(axes, ("entropy", "sharp_entropy"), temperatures, strict=True):
        for index, token in enumerate(data["tokens"]):
            axis.plot(range(1, len(token[name]) + 1), token[name], marker="o", markersize=3, linewidth=1.2,
                      color=_COLOURS[index % 10], label=plain(token["token"]))
        mean, std = data[name]["mean"], data[name]["std"]
        steps = range(1, len(mean) + 1)
        axis.plot(steps, mean, color="#000000", linewidth=2.2, label="mean of all tokens")
        axis.fill_between(steps, [m - s for m, s in zip(mean, std, strict=True)],
                          [m + s for m, s in zip(mean, std, strict=True)], color="#000000", alpha=0.12, linewidth=0)
        axis.set(xlabel="refinement (the last one is the commit)", ylabel="entropy, nats",
                 title=f"τ = {temperature:.3g}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


@styled
def candidates(token: dict[str, Any], shown: int = 5) -> Figure:
    """The nearest tokens of one slot at each step, and how near they are."""
    steps = len(token["candidates"])
    figure, [axis] = _figure(max(6.0, 0.75 * steps), 2.6)
    cosines = [row[:shown] for row in token["cosines"]]
    image = axis.imshow(list(map(list, zip(*cosines, strict=True))), aspect="auto", cmap="Blues", vmin=0.0,
                        vmax=max(0.6, max(map(max, cosines)) * 1.15))
    for step, row in enumerate(token["candidates"]):
        for rank, piece in enumerate(row[:shown]):
            axis.text(step, rank, plain(piece)[:11], ha="center", va="center", fontsize=7,
                      color="white" if cosines[step][rank] > 0.65 * image.get_clim()[1] else "black")
    axis.set(xticks=range(steps), xticklabels=range(1, steps + 1), yticks=range(shown),
             yticklabels=range(1, shown + 1), xlabel="refinement", ylabel="nearest")
    axis.grid(False)
    figure.colorbar(image, label="cosine", pad=0.01)
    return figure


@styled
def diversity(rows: Sequence[dict[str, float]]) -> Figure:
    """K against diversity over seeds."""
    figure, [axis] = _figure(6, 3.6)
    names = {"within": "Dist-2 within a sample", "between": "Dist-2 over all samples together",
             "different": "distinct samples / samples"}
    for index, (name, label) in enumerate(names.items()):
        axis.plot([row["tail_length"] for row in rows], [row[name] for row in rows], marker=_MARKS[index],
                  color=_COLOURS[index], label=label)
    axis.set(xlabel="tail length K", xscale="log", ylim=(0, 1.05))
    axis.set_xticks([row["tail_length"] for row in rows], [str(int(row["tail_length"])) for row in rows])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


@styled
def gap(data: dict[str, Any]) -> Figure:
    """Loss and accuracy by maturity, on simulated and on real tails."""
    figure, axes = _figure(9, 3.6, 2)
    for axis, name, label in zip(axes, ("loss", "top1"), ("InfoNCE over all of V, nats", "top-1"), strict=True):
        for index, kind in enumerate(("simulated", "real")):
            axis.plot(data["maturity"], data[f"{kind}_{name}"], marker=_MARKS[index], color=_COLOURS[index],
                      label=f"{kind} tail")
        axis.set(xlabel="maturity of the slot", ylabel=label)
        axis.legend(fontsize=8)
    return figure


@styled
def experiments(rows: Sequence[dict[str, Any]]) -> Figure:
    """The fronts of experiments: those of their baselines in grey, a colour per experiment, a line per seed. The plot
    is cut off far above the human text's perplexity."""
    figure, [axis] = _figure(9, 5.5)
    names = list(dict.fromkeys(row["experiment"] for row in rows))
    colours = [colour for colour in _COLOURS if colour != _GREY]
    shown: set[str] = set()

    def draw(points: Sequence[dict[str, Any]], label: str, colour: str, style: str) -> None:
        best = front([Point(p["label"], p["repetition"], p["perplexity"]) for p in points
                      if p["repetition"] is not None and p["perplexity"] is not None])
        axis.plot([p.repetition for p in best], [p.perplexity for p in best], style, color=colour, markersize=3,
                  linewidth=1.2, label=None if label in shown else label)
        shown.add(label)

    for row in rows:
        found = row["frontier"]
        draw([p for p in found["points"] if p["is_sampling"]], SAMPLING, _GREY, "--")
        draw([p for p in found["points"] if p["is_baseline"]], ALL_CURVES, _GREY, ":")
        draw([p for p in found["points"] if not p["is_baseline"]], row["experiment"],
             colours[names.index(row["experiment"]) % len(colours)], "o-")
        axis.plot(found["human"]["repetition"], found["human"]["perplexity"], "*", color="#000000", markersize=13,
                  label=None if "human" in shown else "human")
        shown.add("human")
    axis.set(xlabel="repetition (Rep-3)", ylabel="judge perplexity", yscale="log")
    if rows:
        axis.set_ylim(top=2.5 * max(row["frontier"]["human"]["perplexity"] for row in rows))
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
    axis.legend(fontsize=8)
    return figure
