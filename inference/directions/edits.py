# SPDX-License-Identifier: Apache-2.0
"""Edits of pictures: how far they are moved along which directions."""
from collections.abc import Sequence

from dnnlib import UserError
from dnnlib.util import list_some
from inference.directions.files import Directions
from training.generator.synthesis import Offset, combined

Edit = tuple[str, float]            # The name of a direction and a strength in its units.


def check_edits(paths: Sequence[str], names: Sequence[str]) -> None:
    """Refuse edits without files, and files without edits. Raises UserError."""
    if names and not paths:
        raise UserError(f"the edit {names[0]}: needs the file that has this direction: name it by --directions "
                        "(directions.py makes it)")
    if paths and not names:
        raise UserError(f"--directions={','.join(paths)}: has no effect without --edit=NAME:STRENGTH: leave it out")


def find_offset(files: Sequence[Directions], name: str) -> Offset:
    """What one unit of a direction adds.

    Raises:
        UserError: none of the files has it, or several; it moves no layer of this network.
    """
    found: list[Offset] = []
    places: list[str] = []
    for directions in files:
        try:
            found.append(directions.offset(name))
            places.append(directions.where)
        except KeyError:
            pass
    if not found:
        names = [known for directions in files for known in directions.names]
        raise UserError(f"the edit {name}: no direction of this name in {list_some([d.where for d in files])}, but "
                        f"{list_some(names, 10)}: give one of these")
    if len(found) > 1:
        raise UserError(f"the edit {name}: {' and '.join(places)} both have this direction: name one of these files "
                        "only")
    if found[0].is_zero:
        raise UserError(f"the edit {name}: moves no layer of this network: give a direction of other layers")
    return found[0]


def edit_offset(files: Sequence[Directions], edits: Sequence[Edit]) -> Offset:
    """What all edits together add. Strengths of one direction add up.

    Raises:
        UserError: as `find_offset`.
    """
    return combined([(strength, find_offset(files, name)) for name, strength in edits])
