"""The node's cache: one process fetches for all, whatever dies when; what is in use stays; the rest goes when room is needed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tidepool.errors import DiskError, SpecError, StoreError
from tidepool.storage import cache as cache_module
from tidepool.storage import cached_folder, release

TIMEOUT_S = 60
NUM_CHUNKS, CHUNK = 8, b"tide" * 65_536
# One joiner: fetches the folder chunk by chunk from the counting server, says so, and lives until it may end.
_JOINER = """
import sys
from pathlib import Path
from urllib.request import urlopen
from tidepool.storage import cached_folder
url, root, num_chunks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def fill(folder):
    with (folder / "weights").open("wb") as file:
        for number in range(num_chunks):
            file.write(urlopen(f"{url}/{number}").read())

folder = cached_folder(root, "d1", lambda: 1, fill)
print((folder / "weights").stat().st_size, flush=True)
sys.stdin.read()
"""


class _Store(ThreadingHTTPServer):
    """Counts the requests for each chunk; the answer to one chunk can be held back, so that a fetcher stands in its middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: Counter[int] = Counter()
        self.held_chunk: int | None = None
        self.is_held, self.go_on = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Store

    def do_GET(self) -> None:
        number = int(self.path.strip("/"))
        self.server.requests[number] += 1
        if number == self.server.held_chunk:
            self.server.held_chunk = None
            self.server.is_held.set()
            self.server.go_on.wait(TIMEOUT_S)
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CHUNK)))
            self.end_headers()
            self.wfile.write(CHUNK)
        except (BrokenPipeError, ConnectionResetError):  # the one that asked was killed
            return

    def log_message(self, format: str, *_arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[_Store]:
    with _Store() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def joiners(server: _Store, tmp_path: Path) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    """Starts a process that asks the cache in `tmp_path/cache` for the folder."""
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _JOINER, server.url, str(tmp_path / "cache"), str(NUM_CHUNKS)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


@pytest.mark.chaos
def test_ten_processes_fetch_once_although_the_first_is_killed_in_the_middle(
    server: _Store, joiners: Callable[[], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    server.held_chunk = 5
    first = joiners()
    assert server.is_held.wait(TIMEOUT_S)
    others = [joiners() for _ in range(9)]
    waiting = _lock_waiters(tmp_path / "cache" / ".locks" / "d1", 9)
    assert waiting == {process.pid for process in others}, "they wait for the one that fetches"
    assert sum(server.requests.values()) == 6
    first.send_signal(signal.SIGKILL)
    assert first.wait(TIMEOUT_S) == -signal.SIGKILL
    for process in others:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == NUM_CHUNKS * len(CHUNK)
    assert server.requests == {number: 2 if number <= 5 else 1 for number in range(NUM_CHUNKS)}, "the dead one's, and one more"
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name not in (".locks", ".uses")] == ["d1"]
    assert (tmp_path / "cache" / "d1" / "weights").read_bytes() == CHUNK * NUM_CHUNKS


def _lock_waiters(path: Path, number: int) -> set[int]:
    """The processes that the kernel shows blocked at the lock of a file, once there are so many."""
    inode = f":{path.stat().st_ino}"
    pause, blocked = threading.Event(), set[int]()
    for _ in range(TIMEOUT_S * 20):
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        blocked = {int(line[5]) for line in lines if line[1] == "->" and line[6].endswith(inode)}
        if len(blocked) >= number:
            return blocked
        pause.wait(0.05)
    raise AssertionError(f"only {len(blocked)} of {number} wait")


def _filled(root: Path, digest: str, size_bytes: int = 1000) -> Path:
    return cached_folder(root, digest, lambda: size_bytes, lambda folder: _write(folder, size_bytes))


def _write(folder: Path, size_bytes: int) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"w" * size_bytes)


def _digests(root: Path) -> set[str]:
    return {path.name for path in root.glob("[!.]*")}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that holds 3,500 bytes; what this process still holds is released."""
    monkeypatch.setenv("TIDEPOOL_CACHE_GB", "3.5e-6")
    root = tmp_path / "cache"
    yield root
    for path in [path for path in cache_module._held if path.is_relative_to(root)]:
        while cache_module._held[path]:
            release(path)


def _age(root: Path, *digests: str) -> None:
    """Make them used in this order, long ago."""
    for number, digest in enumerate(digests):
        os.utime(root / ".uses" / digest, (1000 + number, 1000 + number))


def test_what_was_used_longest_ago_goes_when_room_is_needed(root: Path) -> None:
    for digest in "abc":
        release(_filled(root, digest))
    _age(root, "a", "b", "c")
    release(_filled(root, "a"))  # a hit, which makes it the newest
    release(_filled(root, "d"))
    assert _digests(root) == {"a", "c", "d"}
    release(_filled(root, "e", 2500))
    assert _digests(root) == {"d", "e"}


def test_what_somebody_uses_stays_even_above_the_limit_and_goes_after_that(root: Path) -> None:
    for digest in "abcde":
        _filled(root, digest)
    assert _digests(root) == set("abcde")
    for digest in "ab":
        release(root / digest)
    _age(root, *"abcde")
    release(_filled(root, "f"))
    assert _digests(root) == set("cdef"), "those that nobody used are gone"


def test_a_use_by_another_process_counts_until_it_ends_however_it_ends(root: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, end = context.Event(), context.Event()
    process = context.Process(target=_hold_in_another_process, args=(root, held, end))
    process.start()
    assert held.wait(TIMEOUT_S)
    for digest in "abcd":
        release(_filled(root, digest))
    assert "other" in _digests(root)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(TIMEOUT_S)
    _age(root, "other")
    release(_filled(root, "e"))
    assert "other" not in _digests(root)


def _hold_in_another_process(root: Path, held: Any, end: Any) -> None:
    _filled(root, "other")
    held.set()
    end.wait(TIMEOUT_S)


def test_a_folder_held_twice_is_in_use_until_it_is_released_twice(root: Path) -> None:
    folders = [_filled(root, "a"), _filled(root, "a")]
    _age(root, "a")
    release(folders[0])
    for digest in "bcde":
        release(_filled(root, digest))
    assert "a" in _digests(root)
    release(folders[1])
    release(folders[1])  # once too often: ignored
    _age(root, "a")
    release(_filled(root, "f"))
    assert "a" not in _digests(root)


def test_what_dead_processes_left_half_filled_goes(root: Path) -> None:
    (root / ".filling-dead").mkdir(parents=True)
    (root / ".filling-dead" / "weights").write_text("half")
    _filled(root, "a")
    assert not (root / ".filling-dead").exists()


def test_nothing_is_left_of_a_fetch_that_failed_and_the_next_one_is_tried(root: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half")
        raise StoreError("the store is away")

    with pytest.raises(StoreError, match="is away"):
        cached_folder(root, "a", lambda: 4, fail)
    assert [path for path in root.iterdir() if path.name not in (".locks", ".uses")] == []
    assert (_filled(root, "a") / "sub" / "weights").stat().st_size == 1000


def test_a_folder_is_synced_before_it_has_its_name_and_its_name_after(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(root).as_posix())
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    _filled(root, "a")
    assert calls.index("rename") == len(calls) - 2
    assert {".filling-a", ".filling-a/sub", ".filling-a/sub/weights"} == set(calls[:-2])
    assert calls[-1] == "."


def test_threads_of_one_process_fill_once(root: Path) -> None:
    fills: list[int] = []

    def fill(folder: Path) -> None:
        fills.append(1)
        _write(folder, 10)

    threads = [threading.Thread(target=cached_folder, args=(root, "a", lambda: 10, fill)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert fills == [1]


@pytest.mark.parametrize("text", ["", "12.5"])
def test_the_limit_is_what_the_environment_says_else_half_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE_GB", text)
    total = os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    assert cache_module.cache_limit_bytes(tmp_path) == (12_500_000_000 if text else total // 2)


@pytest.mark.parametrize("text", ["much", "0", "-3", "nan", "inf"])
def test_a_limit_that_makes_no_sense_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE_GB", text)
    with pytest.raises(SpecError, match=r"TIDEPOOL_CACHE_GB is .*number of gigabytes above 0"):
        _filled(root, "a")


# --- A full disk -----------------------------------------------------------------------------------------------------


def test_a_folder_larger_than_the_disk_is_refused_before_it_is_fetched(small_disk: Path) -> None:
    def fill(_folder: Path) -> None:
        raise AssertionError("it cannot fit")

    with pytest.raises(DiskError, match=r"is full: .* MB of 2\.1 MB are free, 5\.0 MB are needed.*TIDEPOOL_CACHE") as told:
        cached_folder(small_disk / "cache", "a", lambda: 5_000_000, fill)
    assert str(small_disk / "cache") in str(told.value)


def test_a_disk_that_fills_up_meanwhile_is_told_and_leaves_nothing_half_fetched(small_disk: Path) -> None:
    root = small_disk / "cache"
    with pytest.raises(DiskError, match=r"is full: .*TIDEPOOL_CACHE to a folder on a larger disk"):
        cached_folder(root, "a", lambda: 1000, lambda folder: _write(folder, 4_000_000))
    assert [path for path in root.iterdir() if path.name not in (".locks", ".uses")] == []
    assert (_filled(root, "a") / "sub" / "weights").stat().st_size == 1000


def test_a_full_disk_makes_room_of_what_nobody_uses(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEPOOL_CACHE_GB", "1")
    for digest in "ab":
        release(_filled(small_disk, digest, 700_000))
    _age(small_disk, "a", "b")
    _filled(small_disk, "c", 900_000)
    assert _digests(small_disk) == {"b", "c"}


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    code = "import json, sys\nfrom pathlib import Path\nfrom tidepool.errors import DiskError\nfrom tidepool.storage import cached_folder\n"
    code += "import os\nos.setuid(65534)\ntry:\n    cached_folder(Path(sys.argv[1]), 'a', lambda: 1, lambda folder: None)\n"
    code += "except DiskError as error:\n    print(json.dumps(str(error)))"
    if os.getuid() != 0:
        pytest.skip("only root can become nobody")
    (tmp_path / "cache").mkdir(mode=0o755)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "cannot be written (Permission denied): give this user access, or set TIDEPOOL_CACHE" in json.loads(done.stdout), done.stderr
