"""The structures of cuda.h that a launch takes, on a platform of 64 bits."""

import ctypes

import pytest
from support import cupy

if cupy is None:
    pytest.skip("needs CuPy", allow_module_level=True)

from cuflash.cupy_backend import driver


def test_a_launch_attribute():
    assert ctypes.sizeof(driver.Attribute) == 72
    assert driver.Attribute.value.offset == 8


def test_a_launch_configuration():
    names = ("blocks", "threads", "shared_bytes", "stream", "attributes", "attribute_count")
    assert [getattr(driver.Configuration, name).offset for name in names] == [0, 12, 24, 32, 40, 48]
    assert ctypes.sizeof(driver.Configuration) == 56
