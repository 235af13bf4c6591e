"""Where inputs come from: Parquet files, and files behind URLs, S3 among them (moto)."""

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tidepool.data import prepare
from tidepool.data.inputs import list_inputs
from tidepool.data.rows import Document
from tidepool.data.sources import Skipped, read_documents
from tidepool.errors import DataError
from tidepool.specs import DataSpec, parse_spec
from tidepool.storage import open_store

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("weight", pa.int8())])
SCHEMA = pa.schema({"text": pa.string(), "messages": pa.list_(MESSAGE), "prompt": pa.string(), "completion": pa.string()})


def make_spec(path: str | Path, **changes: Any) -> DataSpec:
    one = {"path": str(path)} | changes
    return parse_spec({"store": "memory://sources", "dataset": "d", "inputs": [one], "tokenizer": {"of": "m"}}, DataSpec)


def read(spec: DataSpec) -> tuple[list[Document], Skipped]:
    skipped = Skipped()
    return list(read_documents(list_inputs(spec), skipped)), skipped


def refused(spec: DataSpec) -> str:
    with pytest.raises(DataError) as caught:
        read(spec)
    return str(caught.value)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_rows_of_parquet_are_those_of_jsonl(tmp_path: Path) -> None:
    rows = [
        {"text": "plain"},
        {"messages": [CHAT[0], CHAT[1] | {"weight": 1}, CHAT[0], CHAT[1] | {"weight": 0}]},
        {"prompt": "a", "completion": "b"},
        {"text": "both", "messages": CHAT},
        {"completion": "no prompt"},
    ]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, skipped = read(make_spec(tmp_path, glob="*.parquet", format="parquet"))
    expected, also_skipped = read(make_spec(tmp_path, glob="*.jsonl", format="jsonl"))
    assert len(found) == 3
    assert [document.content_hash for document in found] == [document.content_hash for document in expected]
    assert [document.muted for document in found] == [(), (3,), ()]
    assert [document.place for document in found] == ["rows.parquet:1", "rows.parquet:2", "rows.parquet:3"]
    assert skipped.examples == [example.replace(".jsonl", ".parquet") for example in also_skipped.examples]
    assert skipped.num == 2


def test_a_parquet_file_larger_than_memory_allows_is_read_in_batches(tmp_path: Path) -> None:
    letters = "".join(chr(97 + (i * 7919) % 26) for i in range(997))
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string()), ("id", pa.int64())]), compression="none") as writer:
        for part in range(32):
            texts = [f"{part} {row} {letters}" for row in range(1000)]
            writer.write_table(pa.table({"text": texts, "id": range(1000)}))
    size = (tmp_path / "a.parquet").stat().st_size
    assert size > 25_000_000
    spec = make_spec(tmp_path / "a.parquet", format="parquet")
    before, most, num = pa.total_allocated_bytes(), 0, 0
    for document in read_documents(list_inputs(spec), Skipped()):
        num += 1
        assert document.text is not None
        most = max(most, pa.total_allocated_bytes() - before)
    assert num == 32_000
    assert most < 8_000_000


def test_a_parquet_file_that_holds_nothing_to_read_is_an_error_that_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    message = refused(make_spec(tmp_path, format="parquet"))
    assert "a.parquet has the columns body, id: a Parquet input needs `text`, `messages`, or `prompt` and `completion`" in message


@pytest.mark.parametrize("damage", [lambda _: b"no", lambda data: data[:-9], lambda data: data[:8] + bytes(60) + data[68:]])
def test_a_damaged_parquet_file_is_an_error(tmp_path: Path, damage: Any) -> None:
    pq.write_table(pa.table({"text": ["a" * 100] * 9}), tmp_path / "good.parquet", use_dictionary=False)
    (tmp_path / "bad.parquet").write_bytes(damage((tmp_path / "good.parquet").read_bytes()))
    assert "bad.parquet is not a Parquet file that can be read" in refused(make_spec(tmp_path / "bad.parquet", format="parquet"))


def test_a_parquet_file_that_changed_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["before"]}), tmp_path / "a.parquet")
    files = list_inputs(make_spec(tmp_path, format="parquet"))
    pq.write_table(pa.table({"text": ["after"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="changed while it was being prepared"):
        list(read_documents(files, Skipped()))


# --- URLs ------------------------------------------------------------------------------------------------------------

TREE = {
    "a.txt": b"text of a",
    "b/c.txt": b"text of c",
    "b/d/e.txt": b"text of e",
    "b/skip.md": b"text of skip",
    "rows.jsonl": b'{"text": "one"}\n{"text": "two"}',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, data in TREE.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    pq.write_table(pa.table({"text": ["three", "four"]}), tmp_path / "tree" / "rows.parquet")
    return tmp_path / "tree"


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tree: Path) -> Iterator[str]:
    """The tree behind a URL of each kind."""
    if request.param == "file":
        yield tree.as_uri()
    elif request.param == "memory":
        fsspec.filesystem("memory").put(str(tree), "/tree", recursive=True)
        yield "memory://tree"
        fsspec.filesystem("memory").rm("/tree", recursive=True)
    else:
        yield put_on_s3(tree, request.getfixturevalue("s3_url"))


def put_on_s3(tree: Path, s3_url: str) -> str:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    bucket, prefix = s3_url.removeprefix("s3://").split("/", 1)
    for path in tree.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(tree).as_posix()}", Body=path.read_bytes())
    return s3_url


@pytest.mark.parametrize(
    "choice",
    [
        {"glob": "**/*.txt"},
        {"glob": "*.txt"},
        {"glob": "b/*/*.txt"},
        {"glob": "**/*"},
        {"glob": "*.jsonl", "format": "jsonl"},
        {"glob": "*.parquet", "format": "parquet"},
    ],
    ids=str,
)
def test_a_url_gives_what_the_folder_gives(tree: Path, url: str, choice: dict[str, str]) -> None:
    expected, expected_skipped = read(make_spec(tree, **choice))
    for address in (url, f"{url}/"):
        found, skipped = read(make_spec(address, **choice))
        assert found == expected
        assert skipped == expected_skipped
    here, there = (list_inputs(make_spec(path, **choice)) for path in (tree, url))
    assert [(file.name, file.sha256, file.size_bytes) for file in here] == [(file.name, file.sha256, file.size_bytes) for file in there]


def test_a_url_can_be_one_file(url: str) -> None:
    found, _ = read(make_spec(f"{url}/b/c.txt"))
    assert [(document.place, document.text) for document in found] == [("c.txt", "text of c")]


def test_a_dataset_made_from_a_url_is_the_one_made_from_the_folder(tree: Path, url: str, tokenizer: Any, tokenizer_folder: Path) -> None:
    digests = []
    for path in (tree, url):
        store = open_store(f"memory://{uuid.uuid4().hex}")
        spec = make_spec(path, glob="*.parquet", format="parquet").model_copy(update={"held_out_fraction": 0.0})
        info = prepare(spec, tokenizer, tokenizer_folder, store)
        digests.append((info.digest, [shard.sha256 for shard in info.splits["train"].shards]))
    assert digests[0] == digests[1]


def test_a_listing_is_never_an_old_one(tree: Path, s3_url: str) -> None:
    url = put_on_s3(tree, s3_url)
    assert len(list_inputs(make_spec(url, glob="*.txt"))) == 1
    (tree / "new.txt").write_text("new")
    put_on_s3(tree, s3_url)
    assert len(list_inputs(make_spec(url, glob="*.txt"))) == 2


def test_an_object_that_changes_after_it_was_listed_is_an_error(tree: Path, s3_url: str) -> None:
    url = put_on_s3(tree, s3_url)
    specs = [
        make_spec(url, glob=glob, format=format) for glob, format in (("a.txt", "text"), ("*.jsonl", "jsonl"), ("*.parquet", "parquet"))
    ]
    listed = [list_inputs(spec) for spec in specs]
    for name in ("a.txt", "rows.jsonl"):
        (tree / name).write_text('{"text": "after"}')
    pq.write_table(pa.table({"text": ["after"]}), tree / "rows.parquet")
    put_on_s3(tree, s3_url)
    for files in listed:
        with pytest.raises(DataError, match=r"s3://.* changed while it was being prepared"):
            list(read_documents(files, Skipped()))


def test_a_url_that_leads_nowhere_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere" in refused(make_spec(f"{url}/nowhere"))
    assert "No file below" in refused(make_spec(url, glob="*.nothing"))
    if url.startswith("s3://"):
        message = refused(make_spec("s3://no-such-bucket/x"))
        assert "Cannot read s3://no-such-bucket/x: there is no such file, folder or bucket" in message
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        fsspec.filesystem("s3").clear_instance_cache()
        message = refused(make_spec("s3://bucket/elsewhere"))
        assert message.startswith("Cannot read s3://bucket/elsewhere: ")
        assert "Check the address, the network and the credentials" in message


def test_a_url_of_an_unknown_kind_says_so() -> None:
    assert "Cannot read foo://x: Protocol not known: foo" in refused(make_spec("foo://x"))
