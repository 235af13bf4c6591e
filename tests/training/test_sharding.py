"""The tree over the shards, and who owns what."""

from hypothesis import given
from hypothesis import strategies as st

from tidepool.training.sharding import Node, cover, fold, owned_shards

NUM_SHARDS = st.integers(1, 70)


@given(NUM_SHARDS, st.integers(1, 12))
def test_workers_share_the_shards_evenly_and_in_order(num_shards: int, world_size: int) -> None:
    owned = [owned_shards(rank, world_size, num_shards) for rank in range(world_size)]
    assert [shard for one in owned for shard in one] == list(range(num_shards))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(NUM_SHARDS, st.data())
def test_the_sum_has_the_same_shape_for_every_world_size(num_shards: int, data: st.DataObject) -> None:
    def alone(node: Node) -> str:
        return fold(node, lambda n: str(n.start) if n.stop - n.start == 1 else None, "({}+{})".format)

    whole = alone(Node(0, num_shards))
    world_size = data.draw(st.integers(1, num_shards))
    covers = [cover(owned_shards(rank, world_size, num_shards), num_shards) for rank in range(world_size)]
    known = {node: alone(node) for nodes in covers for node in nodes}
    assert fold(Node(0, num_shards), known.get, "({}+{})".format) == whole
    assert sum(node.stop - node.start for node in known) == num_shards


def test_the_tree_is_the_one_of_the_docstring() -> None:
    shown = fold(Node(0, 7), lambda n: str(n.start) if n.stop - n.start == 1 else None, "({}+{})".format)
    assert shown == "(((0+1)+(2+3))+((4+5)+6))"


@given(st.integers(0, 6), st.integers(0, 6))
def test_an_even_share_is_one_node(log_shards: int, log_world: int) -> None:
    num_shards, world_size = 2**log_shards, 2 ** min(log_world, log_shards)
    assert all(len(cover(owned_shards(rank, world_size, num_shards), num_shards)) == 1 for rank in range(world_size))
