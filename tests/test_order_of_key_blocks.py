"""In which order key blocks begin where backward keeps one, and which of them are cut into pieces where it does not."""

import types

import pytest
from support import cupy

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash.cupy_backend import launch


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)


@pytest.mark.parametrize(
    ("widest", "places", "key_tiles"),
    [(1, 8, 256), (2, 16, 128), (5, 32, 64), (11, 64, 32), (23, 128, 16), (40, 256, 8), (300, 1000, 4), (16, 16, 16), (2, 2, 1024), (5, 7, 64), (3, 3, 1)],
)
def test_the_last_sweep_begins_with_the_longest_key_blocks(widest, places, key_tiles):
    width, last_keys_first = launch.sweeps_in_order(widest, places, key_tiles, 0)
    assert 1 <= width <= widest
    assert last_keys_first % width == 0  # whole sweeps
    first_keys_first = places - last_keys_first
    assert 0 < first_keys_first <= width
    assert first_keys_first == 1 or 1.3 < first_keys_first * key_tiles / 132 < 2.6 or first_keys_first == places // 2


def test_a_head_alone_begins_with_its_last_keys():
    assert launch.sweeps_in_order(1, 1, 64, 0) == (1, 1)


@pytest.mark.parametrize(
    ("blocks", "query_tiles", "uneven", "cut_from", "pieces"),
    [
        (64, 64, False, 0, 2),  # 128 pieces
        (16, 64, False, 0, 8),
        (16, 64, True, 0, 11),
        (2048, 256, False, 15 * 132, 7),  # 68 blocks are left, 476 pieces
        (4096, 128, False, 31 * 132, 16),
        (2048, 64, True, 2048, 1),  # the longest come first, and the others fill what they leave
        (132, 256, False, 132, 1),  # as many as multiprocessors
        (131, 256, False, 131, 1),
        (2048, 8, False, 2048, 1),  # short walks
        (1, 1, False, 1, 1),
    ],
)
def test_key_blocks_are_cut_where_that_pays(blocks, query_tiles, uneven, cut_from, pieces):
    assert launch.cut_key_blocks(blocks, query_tiles, uneven, 0) == (cut_from, pieces)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("query_tiles", [4, 32, 256, 8192])
def test_pieces_have_sums_for_fewer_than_two_key_blocks_a_multiprocessor(query_tiles, uneven):
    for blocks in range(1, 1000):
        cut_from, pieces = launch.cut_key_blocks(blocks, query_tiles, uneven, 0)
        assert (pieces == 1) == (cut_from == blocks)
        assert blocks - cut_from < 2 * 132


@pytest.mark.parametrize("key_tiles", [1, 4, 8, 16, 128, 256])
@pytest.mark.parametrize("sweep_heads", [1, 8, 100])
def test_sums_are_cleared_early_enough_and_of_a_later_sweep(sweep_heads, key_tiles):
    ahead, blocks = launch.clear_ahead(sweep_heads, 10**6, key_tiles, 0)
    assert ahead % sweep_heads == 0
    assert key_tiles / 2 <= blocks <= key_tiles
    after_clearing = ahead * key_tiles - sweep_heads * blocks  # blocks that begin before those that add
    assert after_clearing >= 0.4 * 132 - sweep_heads  # half of a tile at most is missing
    assert launch.clear_ahead(sweep_heads, ahead, key_tiles, 0) == (0, 0)
    assert launch.clear_ahead(sweep_heads, ahead + 1, key_tiles, 0) == (ahead, blocks)


@pytest.mark.parametrize(
    ("head_bytes", "causal", "in_order", "makes_dq", "heads"),
    [
        (2**20, True, True, False, 16),  # eight key blocks of a head run at once
        (2**22, True, True, False, 8),  # sixteen
        (2**23, True, True, False, 4),
        (2**26, True, True, False, 1),
        (2**20, True, False, False, 16),  # each counts as two
        (2**20, False, False, False, 1),
        (2**22, True, False, True, 16),
        (2**20, True, True, True, 32),
        (2**20, False, False, True, 16),
    ],
)
@pytest.mark.parametrize("sequences", [0, 4])
def test_heads_whose_key_blocks_are_swept_together(head_bytes, causal, in_order, makes_dq, heads, sequences):
    problem = types.SimpleNamespace(left=None, right=0 if causal else None, device=0, sequences=sequences)
    head_bytes *= max(1, sequences)  # of which one is in use at a time
    assert launch.sweep_key_blocks(problem, head_bytes, 1000, in_order, makes_dq) == heads
    assert launch.sweep_key_blocks(problem, head_bytes, 2, in_order, makes_dq) == min(2, heads)


@pytest.mark.parametrize(("causal", "sequences", "heads"), [(False, 0, 1), (True, 0, 8), (False, 4, 32), (True, 4, 32)])
def test_heads_whose_query_tiles_are_swept_together(causal, sequences, heads):
    problem = types.SimpleNamespace(left=None, right=0 if causal else None, sequences=sequences)
    assert launch.sweep(problem, 2**22, 1000) == heads
