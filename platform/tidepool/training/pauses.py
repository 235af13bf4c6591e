"""Whether a run is paused: a log in the store, so that every cluster that shares it knows.

    runs/<run>/pauses/<n>.json     {"is_paused", "step"}: the newest entry counts

A run is paused when its state is committed and nothing of it is left in a cluster. Whoever trains it again resumes it.
"""

from tidepool.storage import ObjectStore, append, read_last


def paused_step(store: ObjectStore, run: str) -> int | None:
    """After which step a run was paused, None if it is not."""
    last = read_last(store, _prefix(run))
    return int(last.value["step"]) if last is not None and last.value["is_paused"] else None


def note_paused(store: ObjectStore, run: str, step: int) -> None:
    """The state after so many steps is committed, and the run has left its cluster."""
    append(store, _prefix(run), {"is_paused": True, "step": step})


def note_resumed(store: ObjectStore, run: str) -> None:
    """The run is trained again, if it was paused."""
    if (step := paused_step(store, run)) is not None:
        append(store, _prefix(run), {"is_paused": False, "step": step})


def _prefix(run: str) -> str:
    return f"runs/{run}/pauses/"
