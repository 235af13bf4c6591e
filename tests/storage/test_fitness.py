"""Whether a store is fit for commits: true ones pass and are left empty; each lie is found, told and refused."""

import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.stores import liar as liar_module
from tests.stores.liar import LIES, Liar, liar
from tests.stores.s3 import is_ceph, set_environment
from tidepool import cli
from tidepool.errors import StoreUnfitError, StoreUnreachableError
from tidepool.storage import append, check_fitness, fitness, open_store, require_fit


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Liar]:
    monkeypatch.setattr(liar_module, "_MODIFIED", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))
    with liar() as server:
        set_environment(monkeypatch, server.server)
        yield server


@pytest.fixture
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer objects to list than fill a page: for the tests in which a page is not the point."""
    monkeypatch.setattr(fitness, "_LIST_OBJECTS", 101)


def _url() -> str:
    return f"s3://b{uuid.uuid4().hex}/p"


def test_every_store_of_ours_is_fit_and_left_empty(
    any_store_url: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if not is_ceph(request.config):
        request.getfixturevalue("short_lists")
    assert cli.main(["store", "check", any_store_url]) == 0
    output = capsys.readouterr().out
    assert output.count("  ok  ") == 6
    assert output.endswith("is fit for Tidepool.\n")
    assert list(open_store(any_store_url).list("")) == []


def test_a_server_without_lies_is_fit(server: Liar) -> None:
    assert [finding.name for finding in check_fitness(open_store(_url())) if not finding.is_fit] == []
    assert server.objects == {}


@pytest.mark.parametrize(
    ("lie", "name", "told"),
    [
        ("condition", "one winner", r"of 8 racing writers 9, 9, .* won"),
        ("look-first", "one winner", "of 8 racing writers 8,"),
        ("stale", "read after write", "did not find an object right after"),
        ("parts", "multipart", "an object of 12582912 bytes has"),
        ("range", "ranges", r"bytes \[1, 11\) are not those"),
        ("page", "listing", "of 1001 objects a listing shows 1000"),
        ("delete", "delete", "still there"),
    ],
)
def test_each_lie_is_found_and_what_it_would_cost_is_told(
    server: Liar, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, lie: str, name: str, told: str
) -> None:
    if lie != "page":
        request.getfixturevalue("short_lists")
    server.lies.add(lie)
    assert cli.main(["store", "check", _url()]) == 1
    captured = capsys.readouterr()
    found = re.findall(r"  FAIL  (.*?)  +(.*)\n +This would cost: (.*)\.\n", captured.out)
    failed = ["read after write", "multipart", "delete"] if lie == "stale" else [name]  # these ask first whether it is there
    assert [one for one, _, _ in found] == failed, LIES[lie]
    assert re.search(told, found[0][1]), found[0][1]
    assert all(len(cost) > 20 for _, _, cost in found)
    assert f"is not fit for Tidepool ({', '.join(failed)})" in captured.err
    if lie not in ("delete", "page"):
        assert server.objects == {}


def test_an_endpoint_is_trusted_after_one_race_and_then_for_one_read_a_process(server: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    url = _url()
    require_fit(open_store(url))
    assert [path.split("/")[3] for path in server.objects] == ["endpoints"], "the race left nothing but its mark"
    before = server.num_requests
    require_fit(open_store(url))
    assert server.num_requests == before
    monkeypatch.setattr(fitness, "_trusted", set())  # as in another process
    require_fit(open_store(url))
    assert server.num_requests == before + 1


@pytest.mark.parametrize("lie", ["condition", "look-first"])
def test_an_endpoint_that_loses_the_race_is_refused_until_it_is_repaired(server: Liar, lie: str) -> None:
    url = _url()
    server.lies.add(lie)
    for _ in range(2):
        with pytest.raises(StoreUnfitError, match=r"cannot hold commits: of 8 writers .* won, and exactly one may.*store check"):
            require_fit(open_store(url))
        assert server.objects == {}
    server.lies.clear()
    require_fit(open_store(url))


def test_another_endpoint_for_the_same_data_is_raced_for_anew(server: Liar, monkeypatch: pytest.MonkeyPatch) -> None:
    url = _url()
    require_fit(open_store(url))
    with liar() as other:
        other.objects, other.lies = server.objects, {"condition"}
        set_environment(monkeypatch, other.server)
        with pytest.raises(StoreUnfitError):
            require_fit(open_store(url))


def test_a_store_that_does_not_answer_is_not_called_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    with liar() as server:
        set_environment(monkeypatch, server.server)
    for call in (require_fit, lambda store: list(check_fitness(store))):
        with pytest.raises(StoreUnreachableError):
            call(open_store(_url(), deadline_s=0.5))


def test_stores_of_ours_need_no_race() -> None:
    class Untouchable:
        url = "file:///nowhere"

    require_fit(Untouchable())  # type: ignore[arg-type]


def test_what_two_drivers_could_fight_over_is_not_written_to_an_unfit_store(server: Liar) -> None:
    server.lies.add("condition")
    store = open_store(_url())
    with pytest.raises(StoreUnfitError):
        append(store, "log/", {})
    assert server.objects == {}
    server.lies.clear()
    assert append(store, "log/", {}).number == 1
