# SPDX-License-Identifier: Apache-2.0
"""Small data sets made on the fly."""
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


def pixels(index: int, size: int = 8) -> np.ndarray:
    """uint8 [size, size, 3], different for every index."""
    return np.random.RandomState(index).randint(0, 256, (size, size, 3), dtype=np.uint8)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    """An array or a Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def files(count: int = 6, size: int = 8) -> dict[str, bytes]:
    """`count` PNG files under official names."""
    return {f"00000/img{i:08d}.png": encoded(pixels(i, size)) for i in range(count)}


def metadata(count: int = 6, num_classes: int = 3, **more: Any) -> dict[str, Any]:
    """The dataset.json of `files(count)`: labels 0, 1, 2, 0, ..."""
    return {"labels": [[f"00000/img{i:08d}.png", i % num_classes] for i in range(count)], **more}


def write_zip(path: Path, content: dict[str, bytes], meta: Any = None, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive of `content` and, if given, a dataset.json."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        if meta is not None:
            archive.writestr("dataset.json", json.dumps(meta))
    return path


def write_folder(path: Path, content: dict[str, bytes], meta: Any = None) -> Path:
    """The same as a folder."""
    for name, data in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    if meta is not None:
        (path / "dataset.json").write_text(json.dumps(meta))
    return path
