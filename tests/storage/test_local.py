"""A local directory as a store: what a writer that dies leaves behind, and what goes wrong with files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tidepool.errors import ObjectNotFoundError, StoreError, StoreFullError
from tidepool.storage import local, open_store

_WRITER = """
import sys
from pathlib import Path
from tidepool.storage import open_store

store = open_store(sys.argv[1])
for number in range(10**6):
    store.put_if_absent(f"k/{number}", b"%d" % (number % 10) * 3_000_000)
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    process = subprocess.Popen([sys.executable, "-c", _WRITER, url], stdout=subprocess.PIPE, env=os.environ | _path())
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    reported = 4 + len(process.stdout.read().splitlines())
    process.wait()
    process.stdout.close()
    store = open_store(url)
    found = list(store.list(""))
    assert len(found) >= reported
    assert all(info.size_bytes == 3_000_000 for info in found)
    assert [info.key for info in found] == sorted(f"k/{number}" for number in range(len(found)))
    for info in found:
        assert store.get(info.key) == info.key[-1].encode() * 3_000_000


def test_what_is_written_is_synced_before_it_is_named_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def record_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path).parts[:3]}")
        fsync(descriptor)

    def record_link(source: Path, target: Path) -> None:
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    open_store((tmp_path / "s").as_uri()).put_if_absent("a/b/c", b"x")
    assert "~tmp" in calls[0]
    assert calls[1] == "link"
    assert set(calls[2:]) >= {"fsync ('s', 'a', 'b')", "fsync ('s', 'a')", "fsync ('s',)"}
    assert not list((tmp_path / "s" / "~tmp").iterdir())


def test_temporary_files_of_the_dead_are_hidden_and_go_after_a_day(tmp_path: Path) -> None:
    old, new = (tmp_path / "~tmp" / name for name in ("old", "new"))
    for path in (old, new):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert list(open_store(tmp_path.as_uri()).list("")) == []
    assert (old.exists(), new.exists()) == (False, True)


def test_folders_and_files_in_each_others_place(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    store.put_if_absent("a/b", b"")
    for call in (store.get, store.size):
        with pytest.raises(ObjectNotFoundError, match="folder"):
            call("a")
    with pytest.raises(StoreError, match="a part of it is an object"):
        store.put_if_absent("a/b/c", b"")


def test_a_full_or_failing_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    store = open_store(tmp_path.as_uri())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFullError, match=r"is full: it refused k \(No space left on device\)"):
        store.put_if_absent("k", b"x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_another_deleter_removed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, store = local._sync_folder, open_store(tmp_path.as_uri())
    for key in ("a/b/1", "a/b/2"):
        store.put_if_absent(key, b"")

    def remove_first(folder: Path) -> None:
        monkeypatch.undo()
        store.delete("a/b/2")
        sync(folder)

    monkeypatch.setattr(local, "_sync_folder", remove_first)
    store.delete("a/b/1")
    assert list(store.list("")) == []
    assert not (tmp_path / "a").exists()


def test_paths_with_spaces_and_accents(tmp_path: Path) -> None:
    store = open_store((tmp_path / "mein Speicher ö").as_uri())
    store.put_if_absent("k", b"x")
    assert (tmp_path / "mein Speicher ö" / "k").read_bytes() == b"x"
    assert open_store(store.url).get("k") == b"x"


def _path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(sys.path)}
