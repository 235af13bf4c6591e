"""Scripts as people write them, killed and started again, end with the same bits and the same words as ones that were left alone."""

import pytest
import torch

from tests.transparent.runs import SCRIPTS, Starter
from tidepool.checkpoint import RunLog, verify
from tidepool.storage import open_store

CASES = [
    # Each kill comes when a step like this one, or a later one, has been committed.
    pytest.param("epochs.py", 7, [r"step 7$", r"step 35$", r"step 56$"], id="epochs"),
    pytest.param("iterator.py", 6, [r"step 6$", r"step 24$", r"step 42$"], id="iterator"),
    pytest.param("accumulation.py", 2, [r"step 2$", r"step 6$", r"step 12$"], id="accumulation-amp-workers"),
    pytest.param("gan.py", 9, [r"step 10$", r"step 30$", r"step 60$"], id="gan"),
    pytest.param("oddities.py", 4, [r"step 8$", r"step 16$", r"step 32$"], id="oddities"),
    pytest.param("trainer.py", 3, [r"step 3$", r"step 6$", r"step 12$"], id="trainer"),
]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.chaos
@pytest.mark.parametrize(("name", "every", "kills"), CASES)
def test_the_same_bits_plainly_undisturbed_and_killed(starter: Starter, name: str, every: int, kills: list[str]) -> None:
    script, options = SCRIPTS / name, ["--every-steps", str(every)]
    plain = starter.plain(script)
    assert plain.status == 0, plain.messages
    expected = starter.weights()

    undisturbed = starter.resumable(script, options=["--every-s", "3600"])
    assert (undisturbed.status, undisturbed.committed) == (0, []), undisturbed.messages
    assert undisturbed.output == plain.output
    assert_same(starter.weights(), expected)
    (starter.folder / "store").rename(starter.folder / "undisturbed")

    arrived: list[int] = []
    for kill in kills:
        killed = starter.resumable(script, options=options, on=f"committed {kill}")
        assert killed.status == -9, killed.messages
        assert plain.output.startswith(killed.output[: killed.output.rfind("\n") + 1])
        arrived += killed.committed
    last = starter.resumable(script, options=options)
    assert last.status == 0, last.messages
    assert f"going on from step {arrived[-1]}:" in last.messages
    assert last.output == plain.output
    assert_same(starter.weights(), expected)
    assert arrived + last.committed == sorted(set(arrived + last.committed)), "no step was computed and committed twice"
    for commit in RunLog(open_store(starter.store_url), "r").visible_commits():
        verify(open_store(starter.store_url), "r", commit)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])] == []
