"""Documents from folders: a fixed order, what cannot be used counted and shown, clear errors."""

import json
import os
from pathlib import Path

import pytest

from tidepool.data.inputs import list_inputs
from tidepool.data.rows import EXPECTED, Document
from tidepool.data.sources import Skipped, documents, is_in_fraction, read_documents, sample_texts
from tidepool.errors import DataError
from tidepool.specs import DataSpec, parse_spec


def make_spec(*inputs: dict[str, str]) -> DataSpec:
    return parse_spec({"store": "memory://sources", "dataset": "d", "inputs": list(inputs), "tokenizer": {"of": "m"}}, DataSpec)


def read(spec: DataSpec) -> tuple[list[Document], Skipped]:
    skipped = Skipped()
    return list(read_documents(list_inputs(spec), skipped)), skipped


def test_text_files_are_documents_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.txt", "a.txt", "b/c.txt", "b/skip.md"):
        (tmp_path / name).write_text(f"text of {name}")
    read, skipped = [*documents(make_spec({"path": str(tmp_path), "glob": "**/*.txt"}))], Skipped()
    assert [document.place for document in read] == ["a.txt", "b/c.txt", "z.txt"]
    assert read[1].plain_text == "text of b/c.txt"
    assert skipped.num == 0


def test_files_that_are_not_text_are_counted_and_shown(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("gut: äöü")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    found, skipped = read(make_spec({"path": str(tmp_path)}))
    assert [document.text for document in found] == ["gut: äöü"]
    assert (skipped.num, str(skipped)) == (2, "bad.txt: not UTF-8; empty.txt: empty")


def test_a_path_can_be_one_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    found, _ = read(make_spec({"path": str(tmp_path / "two.txt")}))
    assert [(document.place, document.text) for document in found] == [("two.txt", "two")]


def test_jsonl_rows_are_documents_and_bad_rows_are_shown_with_their_line(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        json.dumps({"text": "plain", "id": 7}),
        "",
        json.dumps({"messages": chat}),
        "{not json",
        json.dumps({"text": "both", "messages": chat}),
        json.dumps({"text": 3}),
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "assistant", "content": None}]}),
        json.dumps({"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}),
        json.dumps({"messages": chat[:1]}),
        json.dumps({"text": "\ud800"}),
        json.dumps([1]),
        "[" * 100_000,
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found, skipped = read(make_spec({"path": str(tmp_path), "format": "jsonl"}))
    assert [document.place for document in found] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert found[1].plain_text == "Hi\nHello"
    assert skipped.num == 10
    shown = dict(example.split(": ", 1) for example in skipped.examples)
    assert shown["rows.jsonl:4"] == "not JSON"
    assert shown["rows.jsonl:5"] == shown["rows.jsonl:12"] == EXPECTED
    assert shown["rows.jsonl:8"] == "message 1 needs `role` and `content`, both strings"
    assert shown["rows.jsonl:9"] == "message 1 has keys that are not supported: tool_calls"
    assert shown["rows.jsonl:10"] == "no message of role `assistant` to learn from"
    assert shown["rows.jsonl:11"] == "not valid Unicode"


def test_only_the_first_skipped_are_remembered() -> None:
    skipped = Skipped()
    for number in range(100):
        skipped.add(f"f:{number}", "bad")
    assert len(skipped.examples) == 10
    assert str(skipped).endswith("f:9: bad (and 90 more)")


@pytest.mark.parametrize(("path", "glob"), [("missing", "**/*"), ("", "*.nothing"), ("", "/absolute/*")])
def test_a_path_that_gives_nothing_is_an_error_that_says_where(tmp_path: Path, path: str, glob: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}.*correct `path`|orrect `path` or `glob`"):
        list(documents(make_spec({"path": str(tmp_path / path), "glob": glob})))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(DataError, match=r"Cannot read .*secret\.txt: Permission denied"):
        list_inputs(make_spec({"path": str(tmp_path)}))


def test_a_file_that_goes_or_changes_after_it_was_listed_is_an_error(tmp_path: Path) -> None:
    for format in ("text", "jsonl"):
        path = tmp_path / f"a.{format}"
        path.write_text('{"text": "before"}')
        files = list_inputs(make_spec({"path": str(path), "format": format}))
        path.write_text('{"text": "after"}')
        with pytest.raises(DataError, match="changed while it was being prepared"):
            list(read_documents(files, Skipped()))
        path.unlink()
        with pytest.raises(DataError, match="Cannot read"):
            list(read_documents(files, Skipped()))


def test_the_draw_of_documents_is_by_content_and_fair() -> None:
    hashes = [Document("x", text=str(number)).content_hash for number in range(4000)]
    drawn = {one for one in hashes if is_in_fraction(one, 0.1, "held out")}
    assert 320 < len(drawn) < 480
    assert drawn <= {one for one in hashes if is_in_fraction(one, 0.2, "held out")}
    assert drawn != {one for one in hashes if is_in_fraction(one, 0.1, "tokenizer")}
    assert Document("a:1", text="same").content_hash == Document("b:9", text="same").content_hash


def test_a_tokenizers_texts_are_a_sample_when_there_is_more(tmp_path: Path) -> None:
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"{number:0100}")
    spec = make_spec({"path": str(tmp_path)})
    assert len(list(sample_texts(spec, 1_000_000))) == 400
    assert 60 < len(list(sample_texts(spec, 10_000))) < 140
