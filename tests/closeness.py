"""How close numbers are, and what share of its bound each comparison used.

Comparisons made with this module are recorded per test: `make test-arithmetics` runs the numeric tests under
arithmetics that round differently and prints the largest share (`tests/arithmetics.py`). Use it where rounding decides
how large an error is. A bound on a statistic, on a step size or on a trained result has its own margin: write that with
plain comparisons or `pytest.approx`.
"""
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

#----------------------------------------------------------------------------
# Records.

@dataclasses.dataclass(frozen=True)
class Comparison:
    """One comparison of an error with its bound."""

    error: float
    bound: float
    place: str          # file:line of the test.

    @property
    def share(self) -> float:
        """The error in units of the bound: above 1 the test fails."""
        return self.error / self.bound if math.isfinite(self.error) else math.inf


_worst: Comparison | None = None    # The worst of the test that runs now.


def start_recording() -> None:
    """Forget what was compared before. `tests/conftest.py` calls it before each test."""
    global _worst
    _worst = None


def worst_comparison() -> Comparison | None:
    """The comparison that came closest to its bound since `start_recording`; None if there was none."""
    return _worst


def _record(error: float, bound: float) -> None:
    global _worst
    # A bound of 0 asks for equality, which uses nothing up; a bound that is an error itself comes from min().
    if bound <= 0 or isinstance(bound, Deviation):
        return
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    found = Comparison(float(error), float(bound), f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
    if _worst is None or not found.share <= _worst.share:
        _worst = found

#----------------------------------------------------------------------------
# Errors: numbers that record the bound that they are compared with.

class Deviation(float):
    """An error, to be compared with a bound: `assert rel_error(a, b) < 1e-5`."""

    def __lt__(self, bound: float) -> bool:
        _record(self, bound)
        return float(self) < bound

    def __le__(self, bound: float) -> bool:
        _record(self, bound)
        return float(self) <= bound

    __hash__ = float.__hash__


def _float64(x: Any) -> np.ndarray:
    # Numbers are not made tensors: a float would be rounded to single precision.
    return x.detach().cpu().double().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=np.float64)


def _arrays(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _float64(a), _float64(b)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return a, b


def rel_error(a: Any, b: Any) -> Deviation:
    """max|a-b| / max|b|."""
    a, b = _arrays(a, b)
    return Deviation(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) if a.size else 0.0)


def l2_error(a: Any, b: Any) -> Deviation:
    """|a-b| / |b|."""
    a, b = _arrays(a, b)
    return Deviation(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def max_error(a: Any, b: Any) -> Deviation:
    """max|a-b|."""
    a, b = _arrays(a, b)
    return Deviation(np.abs(a - b).max() if a.size else 0.0)

#----------------------------------------------------------------------------
# Closeness element by element.

class approx:
    """`pytest.approx` that records: numbers, sequences, arrays and dicts of them. Bounds are those of pytest."""

    __array_ufunc__ = None
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None):
        self.expected, self.rel, self.abs = expected, rel, abs
        self._pytest = pytest.approx(expected, rel=rel, abs=abs)

    def __eq__(self, actual: Any) -> bool:
        self._measure(actual, self.expected)
        return actual == self._pytest

    def __ne__(self, actual: Any) -> bool:
        return not actual == self._pytest

    def __repr__(self) -> str:
        return repr(self._pytest)

    def _measure(self, actual: Any, expected: Any) -> None:
        if isinstance(expected, dict):
            for key in set(expected) & set(actual):
                self._measure(actual[key], expected[key])
        elif isinstance(expected, list | tuple):
            for one, other in zip(actual, expected, strict=False):
                self._measure(one, other)
        elif expected is not None and not isinstance(expected, str):
            rel = self.rel if self.rel is not None else (1e-6 if self.abs is None else 0.0)
            _measure_elements(actual, expected, rel, 1e-12 if self.abs is None else self.abs)


def _measure_elements(actual: Any, expected: Any, rel: float, abs: float) -> None:
    """Record the element that comes closest to its bound `max(rel * |expected|, abs)`."""
    a, b = np.broadcast_arrays(_float64(actual), _float64(expected))
    usable = np.isfinite(a) & np.isfinite(b)
    if not usable.any():
        return
    errors, bounds = np.abs(a - b)[usable], np.maximum(rel * np.abs(b), abs)[usable]
    worst = np.argmax(errors / np.maximum(bounds, 1e-300))
    _record(errors[worst], bounds[worst])


def assert_close(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """|actual - expected| <= atol + rtol * |expected|, element by element, with equal shapes."""
    a, b = _arrays(actual, expected)
    errors, bounds = np.abs(a - b), atol + rtol * np.abs(b)
    if a.size:
        worst = np.unravel_index(np.argmax(errors / np.maximum(bounds, 1e-300)), a.shape)
        _record(errors[worst], bounds[worst])
        assert (errors <= bounds).all(), \
            f"{a[worst]:.9g} where {b[worst]:.9g} is expected, to {bounds[worst]:.2g}; place {tuple(map(int, worst))}"
