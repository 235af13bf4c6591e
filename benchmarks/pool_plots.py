"""A week of a simulated pool as a picture: which part of the GPUs works, and how many jobs wait."""

import sys
from pathlib import Path

Week = dict[str, list[tuple[float, float, float, int]]]
_SHOWN = {
    "ours 1x": "#0b7285",
    "(a) static split": "#c92a2a",
    "(b) FIFO with backfill": "#e8a33d",
    "(d) shortest remaining first": "#868e96",
}


def draw(week: Week, title: str, path: Path) -> None:
    """Write a PNG: utilisation (with serving's part) above, jobs that wait below, over the days."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --plots needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 7), sharex=True, constrained_layout=True)
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
    pyplot.close(figure)
