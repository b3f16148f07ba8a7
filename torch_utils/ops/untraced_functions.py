# SPDX-License-Identifier: Apache-2.0
"""The functions that `tracing.untraced` was told of, in the order of their numbers."""
from collections.abc import Callable

functions: list[Callable[..., object]] = []
