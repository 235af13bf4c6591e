"""`tidepool keys`: a key is shown once, what is listed is all but the key, and what is odd is told."""

import re

import pytest

from tidepool.cli import main
from tidepool.serving.keys import KeyLog
from tidepool.serving.limits import Limits
from tidepool.storage import open_store

Captured = pytest.CaptureFixture[str]


def said(capsys: Captured, *command: str) -> list[str]:
    """The lines that a command prints when it succeeds."""
    status = main(["keys", *command])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out.splitlines()


@pytest.fixture(autouse=True)
def _store(shared_store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_STORE", shared_store_url)


def test_a_key_is_created_listed_and_revoked(capsys: Captured, shared_store_url: str) -> None:
    assert said(capsys, "list") == ["There are no keys in this store yet: `tidepool keys create NAME` makes one."]
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "5000", "--concurrent-requests", "4"]
    told, secret = said(capsys, "create", "ci", "--project", "research", "--model", "bot", "--model", "tides@1", *limits)
    [key] = KeyLog(open_store(shared_store_url)).all()
    assert told == f"Created the key {key.id} (bot,tides@1). Keep it now: it is stored as a hash, and nobody can show it again."
    assert re.fullmatch(rf"tp-{key.id}-[A-Za-z0-9_-]{{43}}", secret)
    assert (key.project, key.models, key.is_admin, key.limits) == ("research", ("bot", "tides@1"), False, Limits(60, 5000, 4))
    boss = said(capsys, "create", "boss", "--admin")[1]
    head, first, second = said(capsys, "list")
    assert head.split() == ["ID", "NAME", "PROJECT", "MODELS", "LIMITS", "CREATED", "STATE"]
    assert re.split(r"  +", first) == [
        key.id,
        "ci",
        "research",
        "bot,tides@1",
        "60 requests/min, 5000 tokens/min, 4 at a time",
        key.created_at,
        "valid",
    ]
    assert re.split(r"  +", second)[1:5] == ["boss", "-", "all+admin", "-"]
    [line] = said(capsys, "revoke", key.id)
    assert line.startswith(f"{key.id} (ci) is revoked since ")
    assert said(capsys, "revoke", key.id) == [line], "again changes nothing"
    lines = said(capsys, "list")
    assert "revoked" in lines[1]
    assert lines[2].endswith("valid")
    for one in (secret, boss):
        assert one not in "\n".join(lines)
        assert key.sha256 not in "\n".join(lines)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["revoke", "nobody"], "No key 'nobody' in "),
        (["create", "a b"], "'a b' cannot be the name of a key or a project"),
        (["create", "ok", "--project", "../up"], "'../up' cannot be the name of a key or a project"),
    ],
)
def test_what_is_odd_is_told(capsys: Captured, command: list[str], message: str) -> None:
    assert main(["keys", *command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
def test_a_limit_is_a_count(capsys: Captured, value: str) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "create", "ci", f"--tokens-per-minute={value}"])
    assert f"argument --tokens-per-minute: invalid limit '{value}': give a whole number of at least 1" in capsys.readouterr().err
    assert said(capsys, "list")[0].startswith("There are no keys")
