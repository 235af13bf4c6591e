import gc

import pytest

from tidepool.collector import collector_paused


def fail() -> None:
    with collector_paused():
        raise ImportError("it was on" if gc.isenabled() else "it was paused")


@pytest.mark.parametrize("is_on", [True, False])
def test_it_is_paused_within_and_as_it_was_afterwards(is_on: bool) -> None:
    if not is_on:
        gc.disable()
    try:
        with pytest.raises(ImportError, match="paused"):
            fail()
        assert gc.isenabled() == is_on
    finally:
        gc.enable()
