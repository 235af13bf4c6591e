"""Who gets a request: a replica that holds what it needs, else the least loaded; what is hot spreads."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.serving.fakes import BASE_DIGEST, adapter
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.backend import Call, Chat, Message
from tidepool.serving.prefixes import MAX_PIECES, PIECE_CHARACTERS, PIECE_TOKENS, HeldPrefixes, prefix_digests
from tidepool.serving.router import ADAPTER_PRICE, Need, ReplicaState, choose

IDLE = ReplicaState(num_free_blocks=100, num_blocks=100)


def busy(num: int, **rest: object) -> ReplicaState:
    return replace(IDLE, num_running=num, **rest)  # type: ignore[arg-type]


def test_the_least_loaded_replica_gets_a_request_that_needs_nothing() -> None:
    assert choose({"a": busy(3), "b": busy(1), "c": busy(2)}, Need()) == "b"
    assert choose({"a": replace(IDLE, num_queued=2), "b": busy(1)}, Need()) == "b"
    assert choose({}, Need()) is None


def test_a_replica_that_holds_the_adapter_is_preferred_until_it_has_much_more_to_do() -> None:
    holder = {"adapters": frozenset({"x"})}
    assert choose({"a": IDLE, "b": busy(2, **holder)}, Need("x")) == "b"
    assert choose({"a": IDLE, "b": busy(int(ADAPTER_PRICE) + 1, **holder)}, Need("x")) == "a"
    assert choose({"a": IDLE, "b": busy(2, **holder)}, Need("y")) == "a"


def test_a_replica_that_holds_more_of_the_prompt_is_preferred() -> None:
    need = Need(None, ("1", "2", "3", "4"))
    half, all_of_it = busy(1, prefixes=frozenset("12")), busy(1, prefixes=frozenset("1234"))
    assert choose({"a": IDLE, "b": half, "c": all_of_it}, need) == "c"
    assert choose({"a": IDLE, "b": half}, need) == "b"
    gap = busy(1, prefixes=frozenset("234"))  # of no use without its beginning
    assert choose({"a": IDLE, "b": gap}, need) == "a"


def test_a_full_cache_counts_as_load() -> None:
    full = busy(1, num_free_blocks=0)
    assert choose({"a": full, "b": busy(5)}, Need()) == "b"
    assert choose({"a": busy(1, num_free_blocks=30), "b": busy(5)}, Need()) == "a"


def test_who_leaves_or_was_left_out_gets_nothing() -> None:
    assert choose({"a": replace(IDLE, is_leaving=True), "b": busy(9)}, Need()) == "b"
    assert choose({"a": IDLE, "b": busy(9)}, Need(), {"a"}) == "b"
    assert choose({"a": IDLE}, Need(), {"a"}) is None


def test_a_hot_adapter_spreads_by_load_and_a_cold_one_stays() -> None:
    """Forty requests at one time for one adapter, and one after the other for another."""
    states = dict.fromkeys("abc", IDLE)
    chosen: Counter[str] = Counter()
    for _ in range(40):
        name = choose(states, Need("hot"))
        assert name is not None
        chosen[name] += 1
        states[name] = replace(states[name], num_running=states[name].num_running + 1, adapters=states[name].adapters | {"hot"})
    assert max(chosen.values()) - min(chosen.values()) <= ADAPTER_PRICE + 1
    states = dict.fromkeys("abc", IDLE)
    places = set()
    for _ in range(10):
        name = choose(states, Need("cold"))
        assert name is not None
        places.add(name)
        states[name] = replace(states[name], adapters=frozenset({"cold"}))
    assert len(places) == 1


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 50), st.booleans(), st.booleans())), st.booleans())
def test_nobody_waits_much_longer_for_what_a_replica_holds(replicas: dict[str, tuple[int, bool, bool]], needs: bool) -> None:
    states = {
        name: busy(num, adapters=frozenset({"x"} if holds else ()), is_leaving=leaves) for name, (num, holds, leaves) in replicas.items()
    }
    chosen = choose(states, Need("x" if needs else None))
    able = {name: state for name, state in states.items() if not state.is_leaving}
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert states[chosen].num_running <= min(state.num_running for state in able.values()) + ADAPTER_PRICE


# --- How prompts begin -----------------------------------------------------------------------------------------------


def digests(prompt: object, number: int | None = None) -> tuple[str, ...]:
    version = None if number is None else adapter(number=number)
    return prefix_digests(Call("r", BASE_DIGEST, version, prompt, SamplingParameters()))  # type: ignore[arg-type]


def test_prompts_that_begin_alike_have_the_first_digests_in_common() -> None:
    start = "tide " * 200
    one, two = digests(start + "x" * 600), digests(start + "y" * 600)
    num_equal = len(start) // PIECE_CHARACTERS
    assert one[:num_equal] == two[:num_equal]
    assert not set(one[num_equal:]) & set(two[num_equal:])
    assert len(digests("tide")) == 0
    assert len(digests("x" * PIECE_CHARACTERS * 1000)) == MAX_PIECES
    assert digests((*tuple(range(PIECE_TOKENS)), 1)) == digests((*tuple(range(PIECE_TOKENS)), 2))
    assert len(digests(tuple(range(PIECE_TOKENS)))) == 1


def test_an_adapter_has_digests_of_its_own() -> None:
    assert not set(digests("x" * 600, 1)) & set(digests("x" * 600, 2))
    assert not set(digests("x" * 600, 1)) & set(digests("x" * 600))


def test_a_chat_that_goes_on_begins_as_it_did() -> None:
    first = (Message("system", "be kind " * 100), Message("user", "hi"))
    longer = (*first, Message("assistant", "hello " * 100), Message("user", "and?"))
    before, after = digests(Chat(first)), digests(Chat(longer))
    assert len(before) > 1
    assert before[:-1] == after[: len(before) - 1]


def test_a_replica_holds_the_pieces_that_its_cache_has_room_for_the_oldest_go_first() -> None:
    held = HeldPrefixes(3 * PIECE_TOKENS)
    held.add(("1", "2"))
    held.add(("1", "3", "4"))
    assert set(held.digests) == {"1", "3", "4"}
    before = held.num_changes
    held.add(("3",))
    assert held.num_changes == before
