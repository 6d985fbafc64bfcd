"""Division by a number that the host knows: its multiplier and shift are exact for every number that kernels divide."""

import numpy
import pytest

launch = pytest.importorskip("cuflash.cupy_backend.launch")

DIVISORS = (1, 2, 3, 5, 7, 10, 12, 33, 127, 128, 129, 641, 1000, 4095, 4096, 4097, 65537, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1)


@pytest.mark.parametrize("divisor", DIVISORS)
def test_quotients_are_exact(divisor):
    magic, shift = launch._divisor(divisor)
    assert 0 <= magic < 2**32
    assert 0 <= shift < 32
    random = numpy.random.default_rng(divisor)
    multiples = random.integers(0, (2**31 - 1) // divisor, 2000, endpoint=True) * divisor
    numbers = numpy.concatenate([multiples, multiples + divisor - 1, random.integers(0, 2**31, 2000), [0, 1, 2**31 - 1]]).astype(numpy.uint64)
    numbers = numbers[numbers < 2**31]
    # As struct Divisor of kernels/problem.cuh: the high half of a product, and a sum that stays in 32 bits.
    quotients = ((numbers * numpy.uint64(magic) >> numpy.uint64(32)) + numbers) >> numpy.uint64(shift)
    assert (quotients == numbers // numpy.uint64(divisor)).all()
    assert ((numbers * numpy.uint64(magic) >> numpy.uint64(32)) + numbers < 2**32).all()

