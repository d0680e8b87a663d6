"""Queues in front of segments: a block that is only lent is as good as a copy."""

import torch

from adaptive_gen.engine.queue import Queue


def test_a_lent_block_is_taken_as_it_stands_without_a_copy():
    queue, block = Queue(), torch.ones(1, 1, 4)
    queue.lend(block, [1], None)
    taken, counts = queue.take()
    assert taken is block and counts == [1] and queue.counts == [0]


def test_an_owned_block_survives_what_overwrites_its_place():
    queue, block = Queue(), torch.ones(1, 1, 4)
    queue.lend(block, [1], None)
    queue.own()
    block.zero_()
    queue.lend(block, [1], None)  # something waits already, so this one is copied at once
    block.fill_(2)
    taken, counts = queue.take()
    assert counts == [2] and taken[0, :, 0].tolist() == [1, 0]


def test_only_one_text_is_lent_to_and_the_rest_is_copied():
    queue, block = Queue(batch=2), torch.ones(2, 1, 4)
    queue.lend(block, [1, 1], None)
    block.zero_()
    assert bool((queue.take()[0] == 1).all())
