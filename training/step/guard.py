# SPDX-License-Identifier: Apache-2.0
"""Non-finite gradients are replaced and counted, and are a reason to stop if they do not cease."""
from collections.abc import Callable

import torch

from training.config import gradient_scale


class GradientGuard:
    """Counts non-finite gradient elements without waiting for the device, and reports the gradients' norms.

    Officially they are replaced in silence (nan by 0, infinities by 1e5). Here they are replaced and counted, and the
    run stops once LIMIT steps of a phase in a row had any.

    Args:
        batch: Global batch size. Our gradients are smaller than the official ones by a factor that depends on it, so
            infinities become smaller numbers, too.
        report: Takes a name and a value.
    """

    LIMIT = 20

    def __init__(self, batch: int, report: Callable[[str, torch.Tensor], None] = lambda name, value: None):
        self.bound = 1e5 * gradient_scale(batch)
        self.report = report
        self._in_a_row: dict[str, torch.Tensor] = {}
        self._total: dict[str, torch.Tensor] = {}
        self._first: dict[str, torch.Tensor] = {}

    def sanitize_(self, name: str, gradient: torch.Tensor) -> None:
        """Replace non-finite elements of a phase's flat gradient in place; remember how many there were and where."""
        norm = gradient.norm()
        zero = torch.zeros([], dtype=torch.int64, device=gradient.device)
        if norm.device.type == "cpu" and norm.isfinite():
            # All elements are finite, which costs no wait to know on a CPU; what follows would take ten times as long.
            self._total.setdefault(name, zero)
            self._in_a_row[name] = zero
            self._first.setdefault(name, zero - 1)
            self.report(f"Gradients/{name}", norm)
            return
        is_bad = ~torch.isfinite(gradient)
        bad = is_bad.sum()
        self._total[name] = self._total.get(name, zero) + bad
        self._in_a_row[name] = torch.where(bad > 0, self._in_a_row.get(name, zero) + 1, zero)
        self._first[name] = torch.where(bad > 0, is_bad.view(torch.uint8).argmax(), self._first.get(name, zero - 1))
        gradient.nan_to_num_(nan=0, posinf=self.bound, neginf=-self.bound)
        self.report(f"Gradients/{name}", gradient.norm())

    def counts(self) -> dict[str, int]:
        """Non-finite elements per phase since the start. Asking waits for the device, here and below."""
        return {name: int(total) for name, total in self._total.items()}

    def steps_in_a_row(self) -> dict[str, int]:
        """Non-finite steps per phase up to now, without a finite one between."""
        return {name: int(steps) for name, steps in self._in_a_row.items()}

    def is_clean(self) -> bool:
        """Whether every phase's last step was finite."""
        return not any(self.steps_in_a_row().values())

    def first_element(self, name: str) -> int | None:
        """Position in the flat gradient of the first bad element of the last bad step."""
        first = int(self._first[name]) if name in self._first else -1
        return None if first < 0 else first

    def failed(self) -> str | None:
        """A phase whose last LIMIT steps all had non-finite gradients."""
        return next((name for name, steps in self.steps_in_a_row().items() if steps >= self.LIMIT), None)
