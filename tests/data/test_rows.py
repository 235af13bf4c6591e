"""Rows become documents, or say why they do not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidepool.data.rows import EXPECTED, Document, parse_row
from tidepool.specs import Loss

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MUTED = BOT | {"weight": 0}


def parse(row: object, loss: Loss = "assistant") -> Document | str:
    return parse_row(row, "f:1", loss, 1.0)


def test_each_shape_is_a_document_and_other_keys_are_ignored() -> None:
    assert parse({"text": "a", "id": 7}) == Document("f:1", text="a")
    assert parse({"prompt": "a", "completion": "b", "score": None}) == Document("f:1", prompt="a", completion="b")
    assert parse({"messages": [USER, BOT]}) == Document("f:1", messages=(USER, BOT))


def test_null_is_absent() -> None:
    """Parquet has every column in every row, and every field in every message."""
    null = {"text": None, "prompt": None, "completion": None}
    assert parse(null | {"messages": [USER | {"weight": None, "tool_calls": None}, BOT]}) == Document("f:1", messages=(USER, BOT))
    assert parse(null | {"messages": None, "text": "a"}) == Document("f:1", text="a")
    assert parse(null) == EXPECTED


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], EXPECTED),
        ({}, EXPECTED),
        ({"prompt": "a"}, EXPECTED),
        ({"completion": "a"}, EXPECTED),
        ({"text": "a", "prompt": "a", "completion": "b"}, EXPECTED),
        ({"prompt": "a", "completion": " "}, "`completion` is not a string with something in it"),
        ({"prompt": [USER], "completion": [BOT]}, "`prompt` is not a string"),
        ({"text": b"bytes"}, "`text` is not a string with something in it"),
        ({"prompt": "\ud800", "completion": "b"}, "not valid Unicode"),
        ({"messages": [USER | {"weight": 0}, BOT]}, "message 1 has a weight of 0: it can be 0 or 1, and only the assistant's"),
        ({"messages": [USER, BOT | {"weight": 0.5}]}, "message 2 has a weight of 0.5"),
        ({"messages": [USER, BOT | {"weight": "0"}]}, "message 2 has a weight of '0'"),
        ({"messages": [USER, BOT | {"wieght": 0}]}, "message 2 has keys that are not supported: wieght"),
        ({"messages": [USER, MUTED, USER, MUTED]}, "every message to learn from has weight 0"),
    ],
)
def test_what_cannot_be_used_says_why(row: object, reason: str) -> None:
    parsed = parse(row)
    assert isinstance(parsed, str)
    assert parsed.startswith(reason)


def test_weights_are_kept_apart_from_what_is_said() -> None:
    parsed = parse({"messages": [USER, MUTED, USER, BOT | {"weight": 1}]})
    assert parsed == Document("f:1", messages=(USER, BOT, USER, BOT), muted=(1,))
    same = parse({"messages": [USER, BOT, USER, BOT]}, "all")
    assert isinstance(parsed, Document)
    assert isinstance(same, Document)
    assert parsed.content_hash == same.content_hash, "held out or not: what is learned of it decides nothing"


def test_the_loss_decides_what_a_chat_must_have() -> None:
    last_is_users, last_is_muted = [USER, BOT, USER], [USER, BOT, USER, MUTED]
    assert isinstance(parse({"messages": last_is_users}), Document)
    assert "`loss: completion` learns that one alone" in str(parse({"messages": last_is_users}, "completion"))
    assert isinstance(parse({"messages": last_is_muted}), Document)
    assert parse({"messages": last_is_muted}, "completion") == "every message to learn from has weight 0"
    assert isinstance(parse({"messages": [USER, MUTED]}, "all"), Document)
    assert parse({"messages": [USER]}, "all") == "no message of role `assistant` to learn from"


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["text", "messages", "prompt", "role", "content", "weight"]), inner)
        ),
    )
)
def test_no_row_is_an_exception(row: object) -> None:
    assert isinstance(parse(row), Document | str)
