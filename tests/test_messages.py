"""What a person is told when a job cannot do its work: one message that says what to do, exit status 1, nothing lost.

Jobs run in this process, and once each as a process of their own. What needs a cluster stands in
training/test_train_cluster.py (a run name in use, another spec) and test_local_cluster.py (serving).
"""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import evaluate, prepare, train
from tests.training.conftest import prepare_dataset, publish_base
from tidepool.cli import main as tidepool
from tidepool.models import ModelSource, add_lora, export_adapter, load_model, load_tokenizer
from tidepool.registry import Registry
from tidepool.specs import LoraSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training import driver

ROOT = Path(__file__).parents[1]
JOBS = {"prepare": prepare, "train": train, "evaluate": evaluate}
WAIT_S = 1.0
TIMEOUT_S = 120

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the dataset `tides`, the model `base`, and three adapters trained on it: `bot` is what it says, the others not."""
    import torch

    folder = tmp_path_factory.mktemp("prepared")
    url = (folder / "store").as_uri()
    publish_base(url, prepare_dataset(url, folder), folder)
    publish_base(url, prepare_dataset(url, folder / "again"), folder, seed=6)
    registry = Registry(open_store(url))
    base, other = registry.resolve("base@1"), registry.resolve("base@2")
    adapted = add_lora(load_model(folder / "base-5", torch.float32), LoraSpec(rank=4), 0, base.ref)
    export_adapter(adapted, load_tokenizer(folder / "base-5"), folder / "bot", ModelSource(base.ref, base.digest, base))
    for name, claimed in (("bot", base), ("liar", other)):
        registry.publish(name, "adapter", folder / "bot", base=claimed.ref, base_digest=claimed.digest, lineage={}, metrics={})
    return url


def spec_of(job: str, url: str, tmp_path: Path) -> dict[str, Any]:
    """A spec that the job would run."""
    (tmp_path / "tide.txt").write_text("the tide comes in and the tide goes out " * 20)
    new = {"dataset": "new", "inputs": [{"path": str(tmp_path / "tide.txt")}], "tokenizer": {"train": {"vocab_size": 300}}}
    return {
        "prepare": new,
        "train": {"run": "told", "dataset": "tides", "model": {"base": "base"}, "training": {"steps": 1}},
        "evaluate": {"model": "base", "dataset": "tides"},
    }[job] | {"store": url}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a job in this process on a spec (or a file's content, or a path) and returns the one message that it ends with."""
    monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TIDEPOOL_STORE", raising=False)

    def refused(job: str, spec: dict[str, Any] | bytes | Path) -> str:
        path = spec if isinstance(spec, Path) else tmp_path / "spec.yaml"
        if not isinstance(spec, Path):
            path.write_bytes(spec if isinstance(spec, bytes) else yaml.safe_dump(spec).encode())
        monkeypatch.setattr(sys, "argv", [f"{job}.py", str(path)])
        status = JOBS[job].main()
        return the_message(status, *capsys.readouterr())

    return refused


def the_message(status: int, out: str, err: str) -> str:
    assert status == 1, out + err
    assert "Traceback" not in out + err
    messages = [line for line in (out + err).splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, out + err
    return err[err.index("error: ") :]


def content(store: ObjectStore) -> list[tuple[str, int]]:
    return [(info.key, info.size_bytes) for info in store.list("")]


# --- The spec --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_every_problem_of_a_spec_is_told_at_once(job: str, refused: Refused, url: str, tmp_path: Path) -> None:
    spec = spec_of(job, url, tmp_path) | {"datset": "x", "store": "relative/folder"}
    del spec["dataset"]
    message = refused(job, spec)
    assert message.splitlines()[0].endswith("spec.yaml cannot be used:")
    assert "  datset: unknown key; did you mean `dataset`?" in message
    assert "  dataset: missing" in message
    assert "  store: the store must be the same from every node: give s3://bucket/prefix" in message
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize("job", JOBS)
def test_without_a_store_one_learns_where_to_name_it(job: str, refused: Refused, url: str, tmp_path: Path) -> None:
    spec = spec_of(job, url, tmp_path)
    del spec["store"]
    assert "add `store: s3://bucket/prefix` to the spec, or set TIDEPOOL_STORE" in refused(job, spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"run: [", "is not valid YAML"),
        (b"run: a\nrun: b\n", "the key 'run' stands twice"),
        (b"- run\n", "expected keys and values, found list. See jobs/*.yaml"),
        (b"", "expected keys and values, found NoneType. See jobs/*.yaml"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_spec_is_told(refused: Refused, text: bytes, message: str) -> None:
    assert message in refused("train", text)


@pytest.mark.parametrize("job", JOBS)
def test_a_spec_that_is_not_there_is_told(job: str, refused: Refused, tmp_path: Path) -> None:
    assert f"Cannot read the spec {tmp_path / 'nowhere.yaml'}: No such file" in refused(job, tmp_path / "nowhere.yaml")
    assert f"Cannot read the spec {tmp_path}: Is a directory. Give the path of a YAML file" in refused(job, tmp_path)


# --- What the spec names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "change", "messages"),
    [
        ("train", {"dataset": "tide"}, ["No dataset tide", "there are: tides", "jobs/prepare.py"]),
        ("train", {"dataset": "Tides!"}, ["'Tides!' is not the name of a dataset"]),
        ("train", {"model": {"base": "bose"}}, ["No model bose in the registry", "did you mean base?"]),
        ("train", {"model": {"base": "bot"}}, ["bot@1 is an adapter: give the base it was trained on (base@1) as model.base"]),
        ("train", {"store": "memory://here"}, ["another store in each process", "s3://bucket/prefix"]),
        ("prepare", {"inputs": [{"path": "/nowhere"}]}, ["There is no file or folder /nowhere"]),
        ("prepare", {"tokenizer": {"of": "bose"}}, ["No model bose in the registry", "did you mean base?"]),
        ("evaluate", {"dataset": "tide"}, ["No dataset tide", "there are: tides"]),
        ("evaluate", {"model": "liar"}, ["was trained on base@1", "not on this base", "train it again on this one"]),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_told_and_nothing_is_written(
    job: str, change: dict[str, Any], messages: list[str], refused: Refused, url: str, tmp_path: Path
) -> None:
    before = content(open_store(url))
    message = refused(job, spec_of(job, url, tmp_path) | change)
    for part in messages:
        assert part in message
    assert content(open_store(url)) == before


# --- The store -------------------------------------------------------------------------------------------------------


class _Forbidding(BaseHTTPRequestHandler):
    """An S3 server that knows nobody."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse

    def log_message(self, format: str, *_arguments: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def closed_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding) as once:
        return once.server_port


@pytest.fixture(params=["refuses", "is away", "has no bucket"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The URL of a store that cannot be used, with the environment that opens it; and what is to be said of it."""
    if request.param == "refuses":
        messages = ["refused access to", "status 403", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"]
        endpoint = f"http://127.0.0.1:{request.getfixturevalue('server').server_port}"
    elif request.param == "is away":
        # The deadline of a job is a minute and a half; here the same store is opened with a short one.
        for module in (prepare, evaluate, driver):
            monkeypatch.setattr(module, "open_store", lambda url: open_store(url, WAIT_S))
        messages = ["gave no answer for", f"within {WAIT_S:g} s", "check the network, AWS_ENDPOINT_URL, and that the store is up"]
        endpoint = f"http://127.0.0.1:{closed_port()}"
    else:
        messages = ["There is no bucket for s3://", "make it first, or correct the name"]
        endpoint = request.getfixturevalue("s3_server").endpoint_url
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"ACCESS_KEY_ID": "somebody", "SECRET_ACCESS_KEY": "s3cret-of-the-test", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    return f"s3://b{uuid.uuid4().hex}/prefix", messages


@pytest.mark.parametrize("job", JOBS)
def test_a_store_that_cannot_be_used_is_told(job: str, broken: tuple[str, list[str]], refused: Refused, tmp_path: Path) -> None:
    url, messages = broken
    message = refused(job, spec_of(job, url, tmp_path))
    for part in [url, *messages]:
        assert part in message
    assert "s3cret" not in message


@pytest.mark.parametrize("job", JOBS)
def test_a_store_that_is_a_file_is_told(job: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("the tide")
    message = refused(job, spec_of(job, (tmp_path / "file").as_uri(), tmp_path))
    assert (tmp_path / "file").as_uri() in message
    assert (tmp_path / "file").read_text() == "the tide"


@pytest.mark.parametrize("broken", ["refuses", "has no bucket"], indirect=True)
def test_the_command_tells_it_too(broken: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    url, messages = broken
    message = the_message(tidepool(["models", "list", "--store", url]), *capsys.readouterr())
    for part in [url, *messages]:
        assert part in message


# --- As processes of their own ---------------------------------------------------------------------------------------


def start_process(job: str, spec: dict[str, Any], folder: Path, **environment: str) -> "subprocess.Popen[str]":
    (folder / f"{job}.yaml").write_text(yaml.safe_dump(spec))
    given = {"PATH": os.environ["PATH"], "HOME": str(folder), "RAY_AUTH_MODE": "disabled"} | environment
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), f"{job}.yaml"]
    return subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def message_of(process: "subprocess.Popen[str]") -> str:
    with process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    return the_message(process.returncode, out, err)


@pytest.mark.slow
def test_as_processes_all_jobs_end_with_the_message_and_status_1(url: str, tmp_path: Path) -> None:
    processes = {job: start_process(job, spec_of(job, url, tmp_path) | {"datset": "x"}, tmp_path) for job in JOBS}
    for job, process in processes.items():
        message = message_of(process)
        assert message.startswith(f"error: {job}.yaml cannot be used:")
        assert "did you mean `dataset`" in message


def test_training_where_no_cluster_answers_says_how_to_get_one_and_begins_nothing(url: str, tmp_path: Path) -> None:
    before = content(open_store(url))
    address = f"127.0.0.1:{closed_port()}"
    message = message_of(start_process("train", spec_of("train", url, tmp_path), tmp_path, RAY_ADDRESS=address))
    assert f"No Ray cluster answers at {address} (RAY_ADDRESS). Start one with `make up`" in message
    assert "ray job submit" in message
    assert content(open_store(url)) == before
