"""Blocks: who holds them, what is found again, and in which order they are given out."""

from tidepool.inference.blocks import Blocks, block_key, root_key


def test_a_key_tells_adapter_tokens_and_all_before_them() -> None:
    first, other = block_key(root_key(None), [1, 2]), block_key(root_key("ad"), [1, 2])
    keys = [first, other, block_key(first, [3, 4]), block_key(other, [3, 4]), block_key(first, [4, 3]), block_key(root_key(None), [258, 0])]
    assert len(set(keys)) == len(keys)
    assert block_key(root_key(None), [1, 2]) == first


def test_free_blocks_are_given_out_oldest_first_and_empty_ones_before_what_may_be_found() -> None:
    blocks = Blocks(4, 2)
    held = [blocks.give_out() for _ in range(4)]
    assert (held, blocks.num_free) == ([0, 1, 2, 3], 0)
    blocks.publish(0, b"a")
    blocks.publish(1, b"b")
    blocks.release([0, 1, 2])
    assert blocks.find([b"a", b"b"]) == [0, 1]
    assert blocks.find([b"x", b"a"]) == []
    assert blocks.give_out() == 2
    assert blocks.give_out() == 1  # the end of what begins alike goes first
    assert blocks.find([b"a", b"b"]) == [0]
    blocks.check([[3], [2], [1]])


def test_a_found_block_is_held_by_several_and_free_after_the_last() -> None:
    blocks = Blocks(2, 2)
    blocks.publish(blocks.give_out(), b"a")
    blocks.hold(blocks.find([b"a"]))
    assert blocks.num_free_without([0, 1]) == 0
    blocks.release([0])
    assert blocks.num_free == 1
    blocks.release([0])
    assert (blocks.num_free, blocks.num_free_without([0])) == (2, 1)
    blocks.hold(blocks.find([b"a"]))
    blocks.check([[0]])


def test_of_two_blocks_with_the_same_content_the_first_is_found_and_forgetting_one_leaves_the_other() -> None:
    blocks = Blocks(3, 2)
    for _ in range(2):
        blocks.publish(blocks.give_out(), b"a")
    assert blocks.find([b"a"]) == [0]
    blocks.forget([1])
    assert blocks.find([b"a"]) == [0]
    blocks.forget([0])
    assert blocks.find([b"a"]) == []
    blocks.check([[0], [1]])
