"""Arrays in LeCun's IDX format are read whole, of any integers and shape, or refused in one line."""

import gzip
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from train.errors import UserError
from train.storage import arrays


def idx(array: NDArray[Any], code: int = 8) -> bytes:
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize(("code", "dtype"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_idx_returns_arrays_of_any_integers_and_shape(code: int, dtype: str, pack: Callable) -> None:
    for shape in ((7,), (3, 2), (2, 5, 4), (2, 5, 4, 3)):
        array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        found = arrays.read_idx(pack(idx(array, code)), "x")
        assert np.array_equal(found, array)
        assert found.dtype == np.dtype(dtype).newbyteorder("=")


GOOD_IDX = idx(np.ones((12, 5, 4), np.uint8))
BAD_IDX: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "web page": (b"<html>", "it is a web page"),
    "floats": (idx(np.ones(3, ">f4"), 13), "begins with [0, 0, 13, 1]"),
    "header only": (GOOD_IDX[:16], "it is cut off, expected 240 bytes"),
    "half a header": (GOOD_IDX[:7], "it is cut off"),
    "three bytes": (GOOD_IDX[:3], "it is cut off"),
    "one byte short": (GOOD_IDX[:-1], "it is cut off, expected 240 bytes"),
    "one byte long": (GOOD_IDX + b"\0", "it is too long, expected 240 bytes"),
    "half packed": (gzip.compress(GOOD_IDX)[:30], "it is cut off"),
    "packed with a wrong sum": (gzip.compress(GOOD_IDX)[:-8] + bytes(8), "CRC check failed"),
    "packed and long": (gzip.compress(GOOD_IDX + b"\0"), "it is too long"),
    "packed twice": (gzip.compress(gzip.compress(GOOD_IDX)), "begins with [31, 139"),
    "exabytes": (bytes([0, 0, 8, 3]) + b"\xff" * 12, "GiB of memory are free"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_read_idx_refuses_what_is_not_whole(case: str) -> None:
    content, words = BAD_IDX[case]
    with pytest.raises(UserError) as error:
        arrays.read_idx(content, "train-images-idx3-ubyte")
    assert str(error.value).startswith("train-images-idx3-ubyte ")
    assert words in str(error.value)
    assert str(error.value).isprintable()
