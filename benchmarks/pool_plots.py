"""Pools as pictures: a week of a simulated one (which part of the GPUs works, how many jobs wait), and who held the slots of a live one."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pool_live_events import Sample

Week = dict[str, list[tuple[float, float, float, int]]]
_SHOWN = {
    "ours 1x": "#0b7285",
    "(a) static split": "#c92a2a",
    "(b) FIFO with backfill": "#e8a33d",
    "(d) shortest remaining first": "#868e96",
}


def draw(week: Week, title: str, path: Path) -> None:
    """Write a PNG: utilisation (with serving's part) above, jobs that wait below, over the days."""
    plots = pyplot()
    figure, (above, below) = plots.subplots(2, 1, figsize=(11, 7), sharex=True, constrained_layout=True)
    serving = week["ours 1x"]
    above.fill_between(
        [s / 86_400 for s, *_ in serving], [part for _, _, part, _ in serving], color="#d0ebff", label="serving (in one pool)"
    )
    for name, color in _SHOWN.items():
        days = [second / 86_400 for second, *_ in week[name]]
        above.plot(days, [training + served for _, training, served, _ in week[name]], color=color, label=name, linewidth=1.2)
        below.plot(days, [waiting for *_, waiting in week[name]], color=color, label=name, linewidth=1.2)
    above.set_ylim(0, 1.02)
    above.set_ylabel("part of the GPUs that works")
    below.set_ylabel("jobs that wait")
    below.set_xlabel("day")
    above.set_title(f"One pool or a split one: {title} (simulated on the Philly and Azure traces)")
    above.legend(loc="lower right", ncols=3, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plots.close(figure)


def draw_slots(sides: Mapping[str, tuple[Sequence[Sample], Sequence[float]]], num_slots: int, path: Path) -> None:
    """Write a PNG: for each side, by its name, who held the slots over time, what serving wanted, and when there were many requests."""
    plots = pyplot()
    figure, rows = plots.subplots(len(sides), 1, figsize=(11, 1 + 2.3 * len(sides)), sharex=True, squeeze=False, constrained_layout=True)
    top = num_slots + 0.4
    for axes, (name, (samples, bounds)) in zip(rows[:, 0], sides.items(), strict=True):
        seconds = [one.at_s for one in samples]
        training = [max(0.0, num_slots - one.free - one.placed) for one in samples]
        parts = {
            "serving": ([one.ready for one in samples], "#1971c2"),
            "serving, starting or leaving": ([one.placed - one.ready for one in samples], "#a5d8ff"),
            "training, starting or leaving": (
                [max(0.0, all_ - one.groups) for all_, one in zip(training, samples, strict=True)],
                "#b2f2bb",
            ),
            "training": ([min(all_, one.groups) for all_, one in zip(training, samples, strict=True)], "#2f9e44"),
        }
        axes.stackplot(
            seconds,
            *(values for values, _ in parts.values()),
            labels=list(parts),
            colors=[color for _, color in parts.values()],
            step="post",
        )
        axes.step(seconds, [one.wanted for one in samples], where="post", color="black", linewidth=1.4, label="replicas that serving wants")
        for begin, until in zip(bounds[1::2], bounds[2::2], strict=False):
            axes.axvspan(begin, until, ymin=(num_slots + 0.15) / top, color="#ffa94d", linewidth=0)
        axes.set_ylim(0, top)
        axes.set_xlim(0, bounds[-1])
        axes.set_yticks(range(num_slots + 1))
        axes.set_ylabel("slots")
        axes.set_title(name, loc="left", fontsize=10)
    rows[-1, 0].set_xlabel("seconds (orange: many requests; white between colours and orange: nobody holds the slot)")
    rows[0, 0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.12), ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plots.close(figure)


def pyplot() -> Any:
    """Matplotlib's, for files; ends the process where there is none."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: a plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots
