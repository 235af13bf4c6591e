"""Asking a served model again and again while something else happens."""

import threading
import time
from collections import Counter
from typing import Self

import httpx

_PAUSE_S = 0.2
_TIMEOUT_S = 120


class Asking:
    """Within its `with`, clients ask a model and count its answers by the version that gave them, in their order, and what failed."""

    def __init__(self, api_url: str, model: str, num_clients: int = 1, max_tokens: int = 8) -> None:
        self._url, self._model, self._max_tokens = f"{api_url}/chat/completions", model, max_tokens
        self.answers: Counter[str] = Counter()
        self.num_failed = 0
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(num_clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, version: str) -> None:
        """Return when a version has answered. Raises `TimeoutError`."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not self.answers[version]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{version} has not answered within {_TIMEOUT_S} s, but {dict(self.answers)}.")
            time.sleep(_PAUSE_S)

    def _ask_on(self) -> None:
        body = {"model": self._model, "messages": [{"role": "user", "content": "def close(self)"}], "max_tokens": self._max_tokens}
        with httpx.Client(timeout=_TIMEOUT_S) as client:
            while not self._is_over.wait(_PAUSE_S):
                try:
                    answer = client.post(self._url, json=body)
                    answer.raise_for_status()
                    self.answers[answer.json()["system_fingerprint"].rpartition("-")[0]] += 1
                except (httpx.HTTPError, ValueError, KeyError):
                    self.num_failed += 1
