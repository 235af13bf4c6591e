"""A process that gets a fraction of its time, as on a machine that throttles it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def throttled(pid: int) -> Iterator[None]:
    """The process runs a fifth of the time: SIGSTOP and SIGCONT in turn."""
    over = threading.Event()

    def throttle() -> None:
        process = psutil.Process(pid)
        try:
            while not over.is_set():
                process.suspend()
                over.wait(0.04)
                process.resume()
                over.wait(0.01)
        except psutil.NoSuchProcess:
            return  # it has ended

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
