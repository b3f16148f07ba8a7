# SPDX-License-Identifier: Apache-2.0
"""Whose images a data set holds and under which licence: "credit" in its dataset.json.

What others made under a licence that asks for it, such as CC BY-SA, must go on to say so wherever it goes: into an
archive, into one that is made of that archive, and into the report of a run.
"""
import dataclasses
import os
from collections.abc import Mapping

from dnnlib import UserError
from dnnlib.util import printable

CREDIT_KEY = "credit"
MAX_LENGTH = 2000               # Characters of one entry.


@dataclasses.dataclass(frozen=True)
class Credit:
    """Each is text, and may be empty."""

    title: str = ""
    attribution: str = ""
    license: str = ""
    license_url: str = ""
    source_url: str = ""
    changes: str = ""           # What was done to the work.

    def __str__(self) -> str:
        links = " ".join(link for link in (self.license_url, self.source_url) if link)
        parts = (self.title, self.license, self.attribution, f"changed: {self.changes}" if self.changes else "", links)
        return printable("; ".join(part for part in parts if part))


def credit_of(where: str | os.PathLike[str], metadata: Mapping[str, object]) -> Credit | None:
    """The credit in the content of a dataset.json; None if it has none.

    Raises:
        UserError: it is not an object of text.
    """
    entries = metadata.get(CREDIT_KEY)
    if entries is None:
        return None
    names = [field.name for field in dataclasses.fields(Credit)]
    if not isinstance(entries, dict) or not all(
            name in names and isinstance(text, str) and len(text) <= MAX_LENGTH for name, text in entries.items()):
        raise UserError(f'{where}: "{CREDIT_KEY}" must hold text of at most {MAX_LENGTH} characters under the names '
                        f"{', '.join(names)}: mend or remove it")
    return Credit(**entries)
