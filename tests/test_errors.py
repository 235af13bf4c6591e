"""The tree of errors: what its docstring draws is what exists, and each survives the way through Ray."""

import inspect
import pickle
import re

import pytest
from ray import cloudpickle

from tidepool import errors
from tidepool.errors import TidepoolError

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
_BRANCH = re.compile(r"^ {4}((?:│   |    )*)(?:[├└]── )?(\w+Error)\b(.*)$")


def drawn() -> dict[str, str]:
    """The tree in the docstring, as name: parent's name."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := _BRANCH.match(line):
            depth = len(found[1]) // 4 + ("── " in line)
            path = [*path[:depth], found[2]]
            parents[found[2]] = path[depth - 1] if depth else "Exception"
            assert found[3].strip() or depth == 0, f"{found[2]} is drawn without a word of what it means"
    return parents


def test_the_drawn_tree_is_exactly_the_classes_that_exist() -> None:
    assert {one.__name__: one.__bases__[0].__name__ for one in CLASSES} == drawn()
    assert all(len(one.__bases__) == 1 for one in CLASSES)
    assert len(CLASSES) > 20


def test_every_error_is_ours_and_says_what_it_is() -> None:
    assert all(issubclass(one, TidepoolError) and one.__doc__ for one in CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("carry", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_an_error_keeps_its_type_and_message_on_the_way(kind: type[TidepoolError], carry: object) -> None:
    sent = kind("The tide is out: wait for it.\n  a second line")
    got = carry.loads(carry.dumps(sent))  # type: ignore[attr-defined]
    assert type(got) is kind
    assert str(got) == str(sent)
    assert got.args == sent.args
