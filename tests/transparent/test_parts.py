"""The parts of a replay, each alone: the journal, outlines, random states, graphs, attributes."""

import random
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tidepool.transparent import attributes
from tidepool.transparent.graphs import pending_graphs
from tidepool.transparent.host_random import HostRandom, set_changes
from tidepool.transparent.journal import Journal
from tidepool.transparent.ledger import Ledger
from tidepool.transparent.outline import OpaqueError, empty, outline, rebuild

Pair = namedtuple("Pair", ["first", "second"])

plain = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3)
descriptors = st.recursive(plain, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6).map(lambda one: ("event", one))
events = st.lists(st.tuples(descriptors, st.binary(max_size=20)), max_size=30)


@given(first=events, later=events)
def test_a_journal_that_was_loaded_is_the_same_and_goes_on(first: list[Any], later: list[Any]) -> None:
    journal = Journal()
    for descriptor, payload in first:
        journal.note(descriptor, payload)
    loaded = Journal.load(journal.export())
    assert [loaded.take() for _ in range(loaded.num_left)] == first
    for descriptor, payload in later:
        loaded.note(descriptor, payload)
    again = Journal.load(loaded.export())
    assert [again.take() for _ in range(again.num_left)] == first + later


def test_an_outline_makes_a_result_of_the_same_form_and_the_same_sharing() -> None:
    argument, large = torch.arange(6.0).view(2, 3), torch.randn(4, 5)
    value = {"a": [large, large[1:, 2], argument], "b": Pair(argument.t(), None), "c": OrderedDict(x=3, y="text"), "d": (1.5, True)}
    new: list[torch.Tensor] = []
    form = outline(value, [argument], new)
    assert new == [large]
    made: list[torch.Tensor] = []
    again = rebuild(form, [argument], made, empty)
    assert again["a"][2] is argument
    assert again["b"].first.data_ptr() == argument.data_ptr()
    assert again["b"].first.stride() == (1, 3)
    made[0].copy_(large)
    assert torch.equal(again["a"][1], large[1:, 2])
    assert (again["c"], again["d"], type(again["b"])) == (value["c"], value["d"], Pair)
    assert outline(again, [argument], []) == form


@pytest.mark.parametrize("value", [object(), [{1.5: 2}], {"x": torch.eye(2).to_sparse()}, lambda: 0])
def test_what_has_no_outline_says_so(value: Any) -> None:
    with pytest.raises(OpaqueError):
        outline(value, [], [])


def test_memory_is_known_by_its_storage_and_forgotten_with_it() -> None:
    ledger, tensor = Ledger(), torch.arange(4.0)
    number = ledger.add(tensor)
    assert ledger.add(tensor[1:]) == number
    assert ledger.holds(tensor.view(2, 2).t())
    other = torch.ones(2)
    ledger.add(other)
    assert [(one, data.numel()) for one, data in ledger.live()] == [(0, 16), (1, 8)]
    dict(ledger.live())[0].zero_()
    assert tensor.sum() == 0
    del tensor
    assert [one for one, _ in ledger.live()] == [1]


@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 1, 400, 2000]), st.booleans())
def test_random_states_go_on_from_what_was_noted(python: int, numpy: int, many: int, has_gauss: bool) -> None:
    random.seed(1)
    np.random.seed(2)
    before = HostRandom.now()
    for _ in range(python * many):
        random.random()
    np.random.rand(numpy * many)
    if has_gauss:
        random.gauss(0, 1)
        np.random.randn()
    changes, after = HostRandom.now().changes(before), HostRandom.now()
    drawn = random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()
    before.set()
    set_changes(changes)
    assert HostRandom.now() == after
    assert (random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()) == drawn
    assert HostRandom.from_json(after.to_json()) == after
    assert bool(changes) == (after != before)


def test_a_graph_is_pending_until_it_is_used_or_useless() -> None:
    weight = torch.ones(3, requires_grad=True)
    used, kept = (weight * weight).sum(), (weight * 2).exp().sum()
    assert sorted(map(id, pending_graphs())) == sorted(map(id, [used, kept]))
    used.backward()
    total = used + 1
    assert [id(one) for one in pending_graphs()] == [id(kept)]
    kept = (weight * weight).sum()
    with torch.no_grad():
        weight.add_(1)
    assert pending_graphs() == []
    del total, kept


class Owner:
    def __init__(self) -> None:
        self.number, self.words, self.pair = 3, ["a"], (1, (2, "x"))
        self.own, self.numpy, self.torch = random.Random(1), np.random.default_rng(2), torch.Generator().manual_seed(3)
        self.inner = [Inner()]
        self.tensor = torch.zeros(2)


class Inner:
    def __init__(self) -> None:
        self.count = 0


def test_attributes_come_back_with_generators_and_what_is_inside() -> None:
    owner = Owner()
    owner.number, owner.words, owner.pair = 4, ["a", "b"], (2, (5, "y"))
    described = attributes.describe(owner, 4)
    drawn = owner.own.random(), owner.numpy.random(), torch.rand(1, generator=owner.torch).item()
    again = Owner()
    again.own.random()
    attributes.restore(again, described)
    assert (again.number, again.words, again.pair) == (4, ["a", "b"], (2, (5, "y")))
    assert (again.own.random(), again.numpy.random(), torch.rand(1, generator=again.torch).item()) == drawn
