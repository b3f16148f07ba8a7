# SPDX-License-Identifier: Apache-2.0
"""The report that `dataset_tool.py` leaves inside a data set."""
import zipfile
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.util import parse_json

REPORT_NAME = "report.json"
MAX_REPORT_BYTES = 256 << 20


def read_report(path: str | Path) -> dict[str, Any] | None:
    """The report inside a data set, or the one beside it that older versions wrote; None if there is neither.

    Raises:
        UserError: it is no JSON object.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".report.json")
    data = None
    if path.is_dir():
        inside = path / REPORT_NAME
        data = inside.read_bytes() if inside.is_file() else None
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                if REPORT_NAME in archive.namelist() and archive.getinfo(REPORT_NAME).file_size <= MAX_REPORT_BYTES:
                    data = archive.read(REPORT_NAME)
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as err:
            raise UserError(f"{path}: cannot be read ({err}): check the path") from err
    if data is None and beside.is_file():
        data = beside.read_bytes()
    if data is None:
        return None
    try:
        report = parse_json(data)
    except ValueError as err:
        raise UserError(f"{path}: {REPORT_NAME} is not valid JSON ({err}): make the data set again") from err
    if not isinstance(report, dict):
        raise UserError(f"{path}: {REPORT_NAME} is no object: make the data set again")
    return report
