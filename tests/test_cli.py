"""The `tidepool` command on a store with published versions: what it prints, what it changes, and how it refuses."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tidepool import __version__
from tidepool.cli import main
from tidepool.registry import ModelVersion, Registry
from tidepool.storage import open_store

ROOT = Path(__file__).parents[1]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory in which no cluster was ever started, and neither a store nor a cluster in the environment."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for variable in ("TIDEPOOL_STORE", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with two versions of the adapter `bot` on `tides`: `bot@1` is canary's, `bot@2` production's."""
    url = (tmp_path / "store").as_uri()
    publish(url, tmp_path / "tides", "tides")
    for number, alias in ((1, "canary"), (2, "production")):
        publish(url, tmp_path / f"bot-{number}", "bot", alias)
    return url


def publish(url: str, folder: Path, name: str, alias: str = "production") -> ModelVersion:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(f"weights of {folder.name}")
    base = {"base": "tides@1", "base_digest": "d" * 64} if name == "bot" else {}
    return Registry(open_store(url)).publish(
        name,
        "adapter" if base else "full",
        folder,
        lineage={"run": f"run-{folder.name}", "step": 40, "dataset": "texts@abc"},
        metrics={"held_out_loss": 1.2345678},
        alias=alias,
        **base,
    )


def said(capsys: Captured, *command: str) -> list[str]:
    """The lines that a command prints when it succeeds."""
    status = main(command)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out.splitlines()


def refusal(capsys: Captured, *command: str) -> str:
    """The one message of a command that fails."""
    status = main(command)
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == err.count("\n") == 1
    return err.removeprefix("error: ")


# --- What there is ---------------------------------------------------------------------------------------------------


def test_list_shows_every_version_and_where_the_aliases_point(capsys: Captured, url: str) -> None:
    lines = said(capsys, "models", "list", "--store", url)
    assert lines[0].split() == ["MODEL", "KIND", "BASE", "ALIASES", "PUBLISHED"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["bot@1", "adapter", "tides@1", "canary"],
        ["bot@2", "adapter", "tides@1", "production"],
        ["tides@1", "full", "-", "production"],
    ]
    assert len({line.index(word) for line, word in zip(lines[1:], ("canary", "production", "production"), strict=True)}) == 1


def test_list_of_an_empty_store_says_how_a_model_gets_there(capsys: Captured, tmp_path: Path) -> None:
    (line,) = said(capsys, "models", "list", "--store", tmp_path.as_uri())
    assert "No models are published" in line
    assert "`publish`" in line


def test_show_tells_what_a_version_is_and_where_it_came_from(capsys: Captured, url: str) -> None:
    version = Registry(open_store(url)).resolve("bot@2")
    lines = [line.strip() for line in said(capsys, "models", "show", "bot", "--store", url)]
    shown = {"model": "bot@2", "kind": "adapter", "digest": version.digest, "base": f"tides@1 (digest {'d' * 64})"}
    shown |= {"run": "run-bot-2", "step": "40", "dataset": "texts@abc", "held_out_loss": "1.23457"}
    for key, value in shown.items():
        assert f"{key}  {value}" in lines
    assert "alias  canary = bot@1 (history: 1)" in lines
    for file in version.files:
        assert f"file  {file.path}  {file.size_bytes} bytes  sha256 {file.sha256}" in lines
    assert "bot@1" in said(capsys, "models", "show", "bot:canary", "--store", url)[0]


# --- Moving aliases --------------------------------------------------------------------------------------------------


def test_promote_and_rollback_move_an_alias_and_say_where_it_is(capsys: Captured, url: str) -> None:
    registry = Registry(open_store(url))
    assert said(capsys, "models", "promote", "bot@1", "--store", url) == ["bot:production is bot@1 now."]
    assert registry.resolve("bot").number == 1
    assert said(capsys, "models", "rollback", "bot", "--store", url) == ["bot:production is bot@2 now."]
    assert registry.resolve("bot").number == 2
    assert said(capsys, "models", "promote", "bot@2", "--alias", "canary", "--store", url) == ["bot:canary is bot@2 now."]
    assert registry.aliases("bot") == {"canary": 2, "production": 2}
    assert "(history: 2 -> 1 -> 2)" in "\n".join(said(capsys, "models", "show", "bot", "--store", url))


def test_a_canary_gets_a_share_and_a_rollback_takes_it_back(capsys: Captured, url: str) -> None:
    said(capsys, "models", "promote", "bot@1", "--alias", "shared", "--store", url)
    assert said(capsys, "models", "promote", "bot@2", "--alias", "shared", "--canary", "0.25", "--store", url) == [
        "bot@2 gets 0.25 of the requests to bot:shared now."
    ]
    assert "alias  shared = bot@1, and 0.25 of it bot@2 (history: 1 -> 1 and 2)" in "\n".join(
        said(capsys, "models", "show", "bot", "--store", url)
    )
    assert said(capsys, "models", "rollback", "bot", "--alias", "shared", "--store", url) == ["bot:shared is bot@1 now."]
    message = refusal(capsys, "models", "promote", "bot@2", "--alias", "shared", "--canary", "2", "--store", url)
    assert "between 0 and 1, not 2" in message


def test_promote_with_what_is_expected_does_it_only_then(capsys: Captured, url: str) -> None:
    message = refusal(capsys, "models", "promote", "bot@1", "--expected", "1", "--store", url)
    assert "bot:production points to bot@2, not to bot@1: look again" in message
    assert Registry(open_store(url)).resolve("bot").number == 2
    message = refusal(capsys, "models", "promote", "bot@1", "--alias", "new", "--expected", "1", "--store", url)
    assert "bot:new points to nothing yet" in message
    said(capsys, "models", "promote", "bot@1", "--expected", "2", "--store", url)
    assert Registry(open_store(url)).resolve("bot").number == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "bott"], "did you mean bot?"),
        (["show", "whale"], "there are: bot, tides"),
        (["show", "bot@7"], "No version 7 of bot; its versions: 1, 2"),
        (["show", "bot@x"], "write bot@3 for the third one"),
        (["show", "bot:beta"], "bot has no alias 'beta'; its aliases: canary, production"),
        (["promote", "bott@1"], "did you mean bot?"),
        (["promote", "bot"], "Which version of bot? Give bot@VERSION"),
        (["promote", "bot:canary"], "Which version of bot:canary? Give"),
        (["promote", "bot@7"], "its versions: 1, 2"),
        (["promote", "bot@1", "--alias", "Up/.."], "'Up/..' cannot be the name of a model or an alias"),
        (["rollback", "bott"], "did you mean bot?"),
        (["rollback", "bot"], "bot:production has no version to go back to: it was never moved"),
        (["rollback", "bot", "--alias", "beta"], "bot:beta has no version to go back to: it does not exist"),
    ],
)
def test_what_is_not_there_is_told_with_what_there_is(capsys: Captured, url: str, command: list[str], message: str) -> None:
    before = snapshot(url)
    assert message in refusal(capsys, "models", *command, "--store", url)
    assert snapshot(url) == before


def snapshot(url: str) -> list[tuple[str, int]]:
    return [(info.key, info.size_bytes) for info in open_store(url).list("")]


# --- Which store -----------------------------------------------------------------------------------------------------


def test_the_store_comes_from_the_option_else_from_the_environment(
    capsys: Captured, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Which store? Give --store s3://bucket/prefix" in refusal(capsys, "models", "list")
    monkeypatch.setenv("TIDEPOOL_STORE", url)
    assert len(said(capsys, "models", "list")) == 4
    assert "No models" in said(capsys, "models", "list", "--store", (tmp_path / "other").as_uri())[0]


@pytest.mark.parametrize("store", ["ftp://x/y", "s3://key:secret@bucket/x", "nothing"])
def test_what_is_no_store_is_told(capsys: Captured, store: str) -> None:
    assert "give s3://bucket/prefix" in refusal(capsys, "models", "list", "--store", store)
    assert "give s3://bucket/prefix" in refusal(capsys, "up", "--store", store)
    assert not Path(".tidepool").exists(), "no cluster was started for it"


# --- The command line itself -----------------------------------------------------------------------------------------


def test_down_where_no_cluster_runs_says_so(capsys: Captured) -> None:
    assert said(capsys, "down") == ["No cluster runs that `tidepool up` started here."]


@pytest.mark.parametrize("command", ["up", "down"])
def test_a_damaged_cluster_file_is_told_and_kept(capsys: Captured, command: str) -> None:
    file = Path(".tidepool/cluster.json")
    file.parent.mkdir()
    file.write_text('{"pid": 1')
    assert ".tidepool/cluster.json is damaged" in refusal(capsys, command)
    assert file.read_text() == '{"pid": 1'


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (["--help"], 0, ["models", "up", "down", "list, show, promote and roll back"]),
        (["models", "--help"], 0, ["list", "show", "promote", "rollback"]),
        (["runs", "show", "--help"], 0, ["RUN", "--json", "--store URL", "TIDEPOOL_STORE"]),
        (["models", "promote", "--help"], 0, ["name@version", "--alias", "--expected VERSION", "--store URL", "TIDEPOOL_STORE"]),
        (["--version"], 0, [f"tidepool {__version__}"]),
        ([], 2, ["usage: tidepool", "COMMAND"]),
        (["modles"], 2, ["invalid choice: 'modles'", "models"]),
        (["models", "promote", "bot@1", "--expected", "x"], 2, ["argument --expected: invalid int value: 'x'"]),
    ],
)
def test_help_version_and_command_lines_that_make_no_sense(capsys: Captured, command: list[str], status: int, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == status
    text = "".join(capsys.readouterr())
    for word in words:
        assert word in text


def test_the_installed_command_and_the_module_do_the_same(url: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "TIDEPOOL_STORE": url}
    commands = [[str(Path(sysconfig.get_path("scripts")) / "tidepool")], [sys.executable, "-m", "tidepool.cli"]]
    for arguments, status in ((["models", "list"], 0), (["models", "show", "bott"], 1)):
        done = [
            subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False)
            for command in commands
        ]
        assert [one.returncode for one in done] == [status, status], done
        assert done[0].stdout == done[1].stdout
        assert done[0].stderr == done[1].stderr
        assert ("bot@2" in done[0].stdout) == (status == 0)
        assert done[0].stderr.startswith("error: ") == (status == 1)
