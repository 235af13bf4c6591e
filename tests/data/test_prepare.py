"""From text to a dataset in a store, and back: whole, repeatable, continued after an interruption."""

import copy
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tidepool.data import Dataset, DatasetInfo, Progress, fetch_tokenizer, find_dataset, prepare, sample_at
from tidepool.errors import DataError, StoreUnreachableError
from tidepool.registry import describe_folder, files_digest
from tidepool.specs import DataSpec, parse_spec
from tidepool.storage import ObjectInfo, ObjectStore, open_store, put_json, read_log

Prepare = Callable[..., DatasetInfo]


class Watched:
    """A store that counts and can be made to fail."""

    def __init__(self, store: ObjectStore) -> None:
        self.inner, self.url = store, store.url
        self.gets: list[tuple[str, int]] = []
        self.tried: set[str] = set()
        self.num_puts, self.fail_after_puts = 0, 10**9

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        if self.num_puts >= self.fail_after_puts:
            raise StoreUnreachableError("the store is gone")
        self.tried.add(key)
        self.inner.put_if_absent(key, data)
        self.num_puts += 1

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        data = self.inner.get(key, start, length)
        self.gets.append((key, len(data)))
        return data

    def size(self, key: str) -> int:
        return self.inner.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def delete(self, key: str) -> None:
        self.inner.delete(key)


@pytest.fixture
def store() -> Watched:
    return Watched(open_store(f"memory://{uuid.uuid4().hex}"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(f"number {number}: " + "the tide comes in and goes out; " * (number % 7 + 1))
    return folder


def make_spec(path: Path, **changes: Any) -> DataSpec:
    value = {
        "store": "memory://unused",
        "dataset": "tides",
        "inputs": [{"path": str(path)}],
        "tokenizer": {"of": "m"},
        "sequence_length": 32,
        "held_out_fraction": 0.2,
        "samples_per_row_group": 4,
        "row_groups_per_shard": 3,
    }
    return parse_spec(value | changes, DataSpec)


def change_object(store: Watched, key: str, change: Callable[[bytes], bytes]) -> None:
    data = store.get(key)
    store.delete(key)
    store.put_if_absent(key, change(data))


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def everything(store: Watched) -> dict[str, bytes]:
    return {entry.key: store.inner.get(entry.key) for entry in store.list("")}


def read_texts(store: Watched, info: DatasetInfo, split: Any, tokenizer: Any) -> str:
    dataset = Dataset(store, info, split, cache_row_groups=2)
    samples = dataset.read(range(len(dataset)))
    return "\n".join(
        str(tokenizer.decode(row[documents >= 0])) for row, documents in zip(samples.tokens_NT, samples.documents_NT, strict=True)
    )


def test_every_document_is_on_one_side_and_comes_back(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    train, held_out = (read_texts(store, info, split, tokenizer) for split in ("train", "held_out"))
    sides = [(f"number {number}:" in train, f"number {number}:" in held_out) for number in range(60)]
    assert all(left != right for left, right in sides)
    assert info.splits["train"].num_documents == sum(left for left, _ in sides)
    assert info.splits["held_out"].num_documents == sum(right for _, right in sides) > 3


def test_the_manifest_tells_what_is_there(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    stored = {key: len(data) for key, data in everything(store).items()}
    manifest = json.loads(store.get(f"{info.prefix}manifest.json"))
    assert info.object_sizes() == {key: size for key, size in stored.items() if "/versions/" not in key and "manifest" not in key}
    assert manifest["splits"]["train"]["num_samples"] == info.num_samples["train"]
    assert find_dataset(store, "tides") == find_dataset(store, info.ref) == info
    train = info.splits["train"]
    assert [shard.num_samples for shard in train.shards[:-1]] == [12] * (len(train.shards) - 1)
    assert sum(shard.num_samples for shard in train.shards) == train.num_samples
    samples = Dataset(store, info, "train", 1).read(range(train.num_samples))
    assert int(samples.loss_mask_NT.sum()) == train.num_target_tokens
    assert int((samples.documents_NT >= 0).sum()) == train.num_tokens


def test_samples_have_the_types_and_shapes_promised(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    dataset = Dataset(store, info, "train", 2)
    samples = dataset.read([3, 0, 3])
    for array, dtype in ((samples.tokens_NT, np.int32), (samples.loss_mask_NT, np.bool_), (samples.documents_NT, np.int32)):
        assert array.shape == (3, 32)
        assert array.dtype == dtype
    assert (samples.tokens_NT[0] == samples.tokens_NT[2]).all()
    assert (samples.tokens_NT[1] == dataset.read([0]).tokens_NT[0]).all()
    assert dataset.read([]).tokens_NT.shape == (0, 32)
    with pytest.raises(IndexError):
        dataset.read([len(dataset)])


def test_preparing_again_is_nothing_to_do(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    before, puts = everything(store), store.num_puts
    with caplog.at_level("INFO", logger="tidepool"):
        assert prepare(make_spec(texts), tokenizer, tokenizer_folder, store) == first
    assert "nothing to do" in caplog.text
    assert everything(store) == before
    assert store.num_puts == puts


def test_the_digest_depends_on_what_shapes_the_samples_alone(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    first = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    moved = texts.rename(tmp_path / "moved")
    assert prepare(make_spec(moved, store="memory://other"), tokenizer, tokenizer_folder, store).digest == first.digest
    longer = prepare(make_spec(moved, sequence_length=64), tokenizer, tokenizer_folder, store)
    (moved / "00.txt").write_text("something else")
    changed = prepare(make_spec(moved), tokenizer, tokenizer_folder, store)
    assert len({first.digest, longer.digest, changed.digest}) == 3
    assert find_dataset(store, "tides") == changed
    assert find_dataset(store, first.ref) == first
    (moved / "00.txt").write_text((moved / "07.txt").read_text().replace("number 7", "number 0"))
    assert prepare(make_spec(moved), tokenizer, tokenizer_folder, store).digest == first.digest
    assert find_dataset(store, "tides") == first, "prepared last, so the bare name means it again"
    assert len(read_log(store, "datasets/tides/versions/")) == 4


@pytest.mark.parametrize("fail_after_puts", range(0, 12, 2))
def test_an_interrupted_preparation_is_invisible_and_can_be_continued(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, fail_after_puts: int
) -> None:
    other = Watched(open_store(f"memory://{uuid.uuid4().hex}"))
    whole = prepare(make_spec(texts), tokenizer, tokenizer_folder, other)
    assert other.num_puts > 10
    store.fail_after_puts = min(fail_after_puts, other.num_puts - 1)
    with pytest.raises(StoreUnreachableError):
        prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    with pytest.raises(DataError, match=r"No dataset tides"):
        find_dataset(store, "tides")
    store.fail_after_puts = 10**9
    assert prepare(make_spec(texts), tokenizer, tokenizer_folder, store) == whole
    mine, theirs = ({key: data for key, data in everything(one).items() if "/versions/" not in key} for one in (store, other))
    assert mine == theirs


def test_a_leftover_with_other_bytes_is_refused(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    key = info.splits["train"].shards[1].key
    store.delete(f"{info.prefix}manifest.json")
    for damage in (lambda data: flip(data, 200), lambda data: data[:-1]):
        change_object(store, key, damage)
        with pytest.raises(DataError, match=f"{key}.*delete it from the store"):
            prepare(make_spec(texts), tokenizer, tokenizer_folder, store)


def test_a_lost_shard_is_an_error_that_preparing_again_repairs(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    key = info.splits["train"].shards[1].key
    expected = read_texts(store, info, "train", tokenizer)
    store.delete(key)
    dataset = Dataset(store, info, "train", 1)
    dataset.read(range(12))  # the first shard is whole
    with pytest.raises(DataError, match=rf"{key} of dataset {info.ref} is missing.*Run jobs/prepare\.py"):
        dataset.read([12])
    assert prepare(make_spec(texts), tokenizer, tokenizer_folder, store) == info
    assert read_texts(store, info, "train", tokenizer) == expected


@pytest.mark.parametrize("place", ["data", "footer", "cut", "magic"])
def test_a_damaged_shard_is_never_read_as_something_else(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, place: str
) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    shard = info.splits["train"].shards[0]
    damage: dict[str, Callable[[bytes], bytes]] = {
        "data": lambda data: flip(data, 120),
        "footer": lambda data: data[:-300] + bytes(100) + data[-200:],
        "cut": lambda data: data[: len(data) // 2],
        "magic": lambda data: flip(data, len(data) - 1),
    }
    change_object(store, shard.key, damage[place])
    with pytest.raises(DataError, match=f"{shard.key} of dataset {info.ref} is damaged.*Delete it"):
        Dataset(store, info, "train", 1).read(range(12))


def test_reading_in_the_global_order_fetches_each_row_group_once_in_a_few_ranges(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    info = prepare(make_spec(texts, held_out_fraction=0.0), tokenizer, tokenizer_folder, store)
    assert info.num_samples["held_out"] == len(Dataset(store, info, "held_out", 1)) == 0
    dataset = Dataset(store, info, "train", cache_row_groups=16)
    expected = dataset.read(range(len(dataset)))
    dataset = Dataset(store, info, "train", cache_row_groups=16)
    store.gets.clear()
    for index in range(len(dataset)):
        sample = sample_at(1, 0, index, dataset.layout)
        assert (dataset.read([sample]).tokens_NT[0] == expected.tokens_NT[sample]).all()
    num_shards, num_row_groups = len(info.splits["train"].shards), dataset.layout.num_row_groups
    assert num_row_groups > 10
    assert len(store.gets) <= 2 * num_shards + num_row_groups


def test_threads_that_need_the_same_fetch_it_once_and_all_learn_of_an_error(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    expected = Dataset(store, info, "train", 16).read(range(8)).tokens_NT
    store.gets.clear()
    Dataset(store, info, "train", 16).read(range(8))
    num_gets = len(store.gets)
    dataset = Dataset(store, info, "train", 16)
    store.gets.clear()
    shard = info.splits["train"].shards[0].key
    data = store.inner.get(shard)
    store.delete(shard)
    with ThreadPoolExecutor(8) as pool:
        for reading in [pool.submit(dataset.read, range(8)) for _ in range(16)]:
            with pytest.raises(DataError, match="is missing from the store"):
                reading.result()
        store.put_if_absent(shard, data)
        store.gets.clear()
        for reading in [pool.submit(dataset.read, range(8)) for _ in range(16)]:
            assert (reading.result().tokens_NT == expected).all()
    assert len(store.gets) == num_gets


def test_no_more_row_groups_are_kept_than_asked_for(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    dataset = Dataset(store, info, "train", cache_row_groups=1)
    dataset.read([0, 4])
    store.gets.clear()
    dataset.read([5])
    assert not store.gets
    dataset.read([1])
    assert len(store.gets) == 1


def test_what_is_skipped_is_said_and_recorded(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (texts / "bad.txt").write_bytes(b"\xff")
    seen: list[Progress] = []
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store, seen.append)
    assert "Skipped 1 files or rows that cannot be used: bad.txt: not UTF-8" in caplog.text
    assert (info.num_skipped, info.skipped_examples) == (1, ("bad.txt: not UTF-8",))
    splits = info.splits.values()
    assert seen == [Progress(60, sum(split.num_tokens for split in splits), sum(info.num_samples.values()), 1)]


def test_progress_is_reported_by_count(store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"tide {number}"}) + "\n" for number in range(2500)))
    seen: list[Progress] = []
    spec = make_spec(tmp_path / "many.jsonl", inputs=[{"path": str(tmp_path / "many.jsonl"), "format": "jsonl"}])
    prepare(spec, tokenizer, tokenizer_folder, store, seen.append)
    assert [progress.num_documents for progress in seen] == [1000, 2000, 2500]


def test_chats_and_texts_make_one_dataset(store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    chat = [{"role": "user", "content": "what comes in?"}, {"role": "assistant", "content": "the tide"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "and goes"}) + "\nbad")
    spec = make_spec(tmp_path, inputs=[{"path": str(tmp_path / "rows.jsonl"), "format": "jsonl"}], held_out_fraction=0, sequence_length=64)
    spec = spec.model_copy(update={"max_skipped_fraction": 0.5})
    info = prepare(spec, tokenizer, tokenizer_folder, store)
    samples = Dataset(store, info, "train", 1).read([0])
    targets = samples.loss_mask_NT[0]
    assert tokenizer.decode(samples.tokens_NT[0][targets & (samples.documents_NT[0] == 0)]) == "the tide<|im_end|>"
    assert tokenizer.decode(samples.tokens_NT[0][samples.documents_NT[0] == 1]) == "and goes<|endoftext|>"
    assert info.skipped_examples == ("rows.jsonl:3: not JSON",)


def write_rows(path: Path, num_good: int, num_bad: int) -> Path:
    path.write_text("".join([json.dumps({"text": f"tide {n}"}) + "\n" for n in range(num_good)] + ['{"txt": 1}\n'] * num_bad))
    return path


def rows_spec(*paths: Path, **changes: Any) -> DataSpec:
    return make_spec(paths[0], **({"inputs": [{"path": str(path), "format": "jsonl"} for path in paths]} | changes))


def test_too_many_bad_rows_are_refused_with_the_first_and_the_way_out(
    store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    good, bad = write_rows(tmp_path / "good.jsonl", 50, 0), write_rows(tmp_path / "bad.jsonl", 40, 10)
    assert parse_spec(rows_spec(good).model_dump(), DataSpec).max_skipped_fraction == 0.05
    with pytest.raises(DataError) as caught:
        prepare(rows_spec(good, bad), tokenizer, tokenizer_folder, store)
    message = str(caught.value)
    assert message.startswith("10 of 100 rows and files of dataset tides cannot be used, more than max_skipped_fraction (0.05) allows.")
    assert 'bad.jsonl:41: expected {"text": ...}' in message
    assert "Correct the inputs, or raise max_skipped_fraction in the spec" in message
    with pytest.raises(DataError, match="No dataset tides"):
        find_dataset(store, "tides")
    left = everything(store)
    info = prepare(rows_spec(good, bad, max_skipped_fraction=0.1), tokenizer, tokenizer_folder, store)
    assert (info.num_read, info.num_skipped) == (100, 10)
    assert left.items() <= everything(store).items(), "what the refused preparation wrote is used"
    with pytest.raises(DataError, match="10 of 100 rows"):
        prepare(rows_spec(good, bad, max_skipped_fraction=0.09), tokenizer, tokenizer_folder, store)


def test_documents_that_the_template_refuses_count_once_whatever_their_weight(
    store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    picky = copy.deepcopy(tokenizer)
    picky.chat_template = "{{ raise_exception('no') }}"
    chat = {"messages": [{"role": "assistant", "content": "hello"}]}
    path = write_rows(tmp_path / "a.jsonl", 8, 1)
    path.write_text(path.read_text() + json.dumps(chat))
    spec = rows_spec(path, inputs=[{"path": str(path), "format": "jsonl", "weight": 3}], max_skipped_fraction=0.2, held_out_fraction=0)
    info = prepare(spec, picky, tokenizer_folder, store)
    assert (info.num_read, info.num_skipped, info.splits["train"].num_documents) == (10, 2, 24)
    assert info.skipped_examples[1] == "a.jsonl:10: the chat template refuses it: no"


def test_an_inputs_weight_is_how_often_it_is_read_and_decides_nothing_else(
    store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("rare", "usual", "often")}
    for name, path in paths.items():
        path.write_text("".join(json.dumps({"text": f"{name}{n}."}) + "\n" for n in range(400)))

    def prepared(**weights: float) -> tuple[str, str]:
        inputs = [{"path": str(path), "format": "jsonl", "weight": weights.get(name, 1)} for name, path in paths.items()]
        info = prepare(rows_spec(*paths.values(), inputs=inputs), tokenizer, tokenizer_folder, store)
        return read_texts(store, info, "train", tokenizer), read_texts(store, info, "held_out", tokenizer)

    even, even_held_out = prepared()
    mixed, held_out = prepared(rare=0.25, often=2.5)
    assert sorted(held_out.split(".")) == sorted(even_held_out.split("."))
    counts = {name: [mixed.count(f"{name}{n}<") + mixed.count(f"{name}{n}.") for n in range(400)] for name in paths}
    trained = {name: [f"{name}{n}." in even for n in range(400)] for name in paths}
    allowed = {"rare": {0, 1}, "usual": {1}, "often": {2, 3}}
    for name in paths:
        seen = [count for count, is_trained in zip(counts[name], trained[name], strict=True) if is_trained]
        assert set(seen) == allowed[name]
        assert sum(seen) / len(seen) == pytest.approx({"rare": 0.25, "usual": 1, "often": 2.5}[name], abs=0.1)
        assert not any(count for count, is_trained in zip(counts[name], trained[name], strict=True) if not is_trained)
    first, last = mixed.index("often7."), mixed.rindex("often7.")
    assert last - first > len(mixed) / 4, "copies lie far apart"


def test_what_is_learned_and_how_often_is_part_of_the_digest(
    store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"tide {n}", "completion": " out"}) + "\n" for n in range(9)))
    changes: list[dict[str, Any]] = [{}, {"loss": "all"}, {"weight": 2}]
    specs = [rows_spec(path, inputs=[{"path": str(path), "format": "jsonl"} | change], held_out_fraction=0) for change in changes]
    infos = [prepare(spec, tokenizer, tokenizer_folder, store) for spec in specs]
    assert len({info.digest for info in infos}) == 3
    targets, all_targets, twice = (info.splits["train"].num_target_tokens for info in infos)
    assert targets == 9 * (len(tokenizer(" out")["input_ids"]) + 1) < all_targets
    assert twice == 2 * targets


KILLED = """
import json, sys
from pathlib import Path
from tidepool.data import prepare
from tidepool.models import load_tokenizer
from tidepool.specs import DataSpec, parse_spec
from tidepool.storage import open_store

spec = parse_spec(json.loads(sys.argv[1]), DataSpec)
def progress(done):
    print(done, flush=True)
    if done.num_documents >= 3000:
        sys.stdin.read()  # for ever: this process goes no further

prepare(spec, load_tokenizer(Path(sys.argv[2])), Path(sys.argv[2]), open_store(spec.store), progress)
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_a_preparation_that_was_killed_goes_on_with_what_it_wrote(tmp_path: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    """A real SIGKILL, with some shards in the store and one half written."""
    path = write_rows(tmp_path / "rows.jsonl", 8_000, 0)
    spec = rows_spec(path, store=(tmp_path / "killed").as_uri(), samples_per_row_group=16)
    store = Watched(open_store(spec.store))
    command = [sys.executable, "-c", KILLED, spec.model_dump_json(), str(tokenizer_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline()[:9] for _ in range(3)] == ["Progress("] * 3
        process.kill()
    assert process.returncode == -signal.SIGKILL
    written = {entry.key: (tmp_path / "killed" / entry.key).stat() for entry in store.list("")}
    assert written
    assert not any(key.endswith("manifest.json") for key in written)
    with pytest.raises(DataError, match="No dataset tides"):
        find_dataset(store, "tides")
    resumed = prepare(spec, tokenizer, tokenizer_folder, store)
    for key, before in written.items():
        now = (tmp_path / "killed" / key).stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "used as it was, not written again"
    assert store.tried == {entry.key for entry in store.list("")} - written.keys(), "nor uploaded again"
    undisturbed = Watched(open_store(f"memory://{uuid.uuid4().hex}"))
    assert prepare(spec, tokenizer, tokenizer_folder, undisturbed) == resumed
    mine, theirs = ({key: data for key, data in everything(one).items() if "/versions/" not in key} for one in (store, undisturbed))
    assert mine == theirs


def test_nothing_to_train_on_is_an_error(store: Watched, tmp_path: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"hold nothing to train on.*1 files or rows cannot be used\. bad.txt: not UTF-8"):
        prepare(make_spec(tmp_path), tokenizer, tokenizer_folder, store)
    assert not everything(store)


def test_the_tokenizer_comes_along(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    folder = fetch_tokenizer(store, info, tmp_path / "cache")
    assert describe_folder(folder) == describe_folder(tokenizer_folder)
    assert files_digest(describe_folder(folder)) == info.tokenizer_digest
    store.gets.clear()
    assert fetch_tokenizer(store, info, tmp_path / "cache") == folder
    assert not store.gets
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [info.tokenizer_digest]


def test_a_damaged_or_lost_tokenizer_is_an_error(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    key = f"{info.prefix}tokenizer/tokenizer.json"
    change_object(store, key, lambda data: flip(data, 5))
    with pytest.raises(DataError, match="is damaged"):
        fetch_tokenizer(store, info, tmp_path / "cache")
    store.delete(key)
    with pytest.raises(DataError, match=rf"{key} .*is missing"):
        fetch_tokenizer(store, info, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_dataset_that_is_not_there_is_an_error_that_names_what_is(
    store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path
) -> None:
    with pytest.raises(DataError, match=r"No dataset tides in memory.*there are: none yet.*Prepare it"):
        find_dataset(store, "tides")
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    with pytest.raises(DataError, match=r"No dataset tide in memory.*there are: tides"):
        find_dataset(store, "tide")
    with pytest.raises(DataError, match=f"No dataset tides@0123 in memory.*tides has the digests {info.digest}"):
        find_dataset(store, "tides@0123")
    for ref in ("a/b", "", "@", "tides@", "Tides", "../x"):
        with pytest.raises(DataError, match="is not the name of a dataset"):
            find_dataset(store, ref)


def test_a_manifest_that_cannot_be_read_is_an_error(store: Watched, texts: Path, tokenizer: Any, tokenizer_folder: Path) -> None:
    info = prepare(make_spec(texts), tokenizer, tokenizer_folder, store)
    key = f"{info.prefix}manifest.json"
    for value, message in (({"format": 2}, "is damaged"), ({"format": 1}, r"has format 1, .*run jobs/prepare\.py again")):
        store.delete(key)
        put_json(store, key, value)
        with pytest.raises(DataError, match=message):
            find_dataset(store, "tides")
