"""Which key blocks begin with the last keys, and which heads with the first, where backward keeps an order under causal masks."""

import pytest
from support import cupy

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash.cupy_backend import launch


@pytest.mark.parametrize(
    ("widest", "places", "key_tiles"),
    [(1, 8, 256), (2, 16, 128), (5, 32, 64), (11, 64, 32), (23, 128, 16), (40, 256, 8), (300, 1000, 4), (16, 16, 16), (2, 2, 1024), (5, 7, 64), (3, 3, 1), (10**4, 10**5, 1)],
)
def test_the_last_sweep_begins_with_the_longest_key_blocks(widest, places, key_tiles, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    width, last_keys_first = launch.sweeps_in_order(widest, places, key_tiles, 0)
    assert 1 <= width <= widest
    assert last_keys_first % width == 0  # whole sweeps
    first_keys_first = places - last_keys_first
    assert 0 < first_keys_first <= width
    assert first_keys_first == 1 or 1.3 < first_keys_first * key_tiles / 132 < 2.6 or first_keys_first == places // 2


def test_a_head_alone_begins_with_its_last_keys(monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    assert launch.sweeps_in_order(1, 1, 64, 0) == (1, 1)
