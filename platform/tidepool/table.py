"""Facts as text for a person: tables and durations."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the cells of each column below one another; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def span(time_s: float) -> str:
    """A duration in the unit that suits it."""
    for limit, unit, unit_s in ((10, "s", 1), (120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if time_s < limit:
            return f"{time_s / unit_s:.{1 if limit == 10 else 0}f} {unit}"
    return f"{time_s / 86_400:.0f} days"
