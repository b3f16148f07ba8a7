# SPDX-License-Identifier: Apache-2.0
"""Videos written frame by frame: H.264 in .mp4, animations in .webp and .gif, or a folder of PNG files.

The encoder is the program ffmpeg that the package imageio-ffmpeg brings along. It is started here and not by that
package's own writer, which does not say whether the program succeeded: a full disk would leave half a video.
"""
import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib import UserError
from dnnlib.util import atomic_folder, atomic_path, printable

Write = Callable[[np.ndarray], None]        # Takes a frame, uint8 [H, W, 3].

# A file that does not name its colours is shown in other ones by some players.
BT709 = ("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,"
         "setparams=color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv")
# Each frame of a .gif gets its own 256 colours. Common ones would need all frames in memory.
PALETTES = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"


@dataclasses.dataclass(frozen=True)
class VideoFormat:
    """How frames are stored."""

    name: str
    largest: int                    # Pixels of a side at most.
    fps: int                        # Frames per second if nothing else is asked for.
    highest_fps: int                # Players show faster ones slowly.
    arguments: tuple[str, ...] = ()                 # Of ffmpeg.
    even: bool = False              # Whether sides have even numbers of pixels.


FORMATS = {
    ".mp4": VideoFormat("mp4", 8192, 60, 240, ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-b:v", "12M", *BT709,
                                               "-movflags", "+faststart"), even=True),
    ".webp": VideoFormat("webp", 16383, 60, 90, ("-c:v", "libwebp_anim", "-quality", "90", "-loop", "0")),
    ".gif": VideoFormat("gif", 16383, 50, 50, ("-vf", PALETTES, "-loop", "0")),
}
FOLDER = VideoFormat("PNG frames", 16383, 60, 240)

#----------------------------------------------------------------------------

def video_format(path: str) -> VideoFormat:
    """The format that a file name asks for; a name without a suffix, or one that ends with a slash, is a folder.

    Raises:
        UserError: no format has this suffix.
    """
    name = "" if path.endswith(("/", os.sep)) else Path(path).name
    suffix = Path(f"_{name}").suffix.lower()            # The name may be the suffix alone.
    if suffix and suffix not in FORMATS:
        raise UserError(f"{path}: no video format has the suffix {suffix}: name a file that ends with "
                        f"{', '.join(FORMATS)}, or a folder for PNG frames, with a slash at its end")
    return FORMATS.get(suffix, FOLDER)


@contextlib.contextmanager
def open_video(path: str, width: int, height: int, fps: int) -> Iterator[Write]:
    """A function that takes the frames of a video one by one, for the block. There is no file before all is written.

    Args:
        path: See `video_format`. A file is replaced, a folder must be empty.
        width: Of the frames.
        height: Of the frames.
        fps: Frames per second.

    Raises:
        UserError: the frames are too large for the format, or too fast; the encoder is missing, or fails.
        OSError: the path cannot be written.
    """
    form = video_format(path)
    if max(width, height) > form.largest:
        raise UserError(f"{path}: frames of {width}x{height} pixels: {form.name} takes at most {form.largest} on a "
                        "side: make the grid or the zoom smaller")
    if fps > form.highest_fps:
        raise UserError(f"{path}: {fps} frames per second: players show {form.name} with at most {form.highest_fps}: "
                        "ask for fewer, or for .mp4")
    if form is FOLDER:
        with _png_folder(path) as write:
            yield write
        return
    program = _ffmpeg(path)
    with atomic_path(path) as temp:
        shape = height + height % 2 * form.even, width + width % 2 * form.even
        command = [program, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{shape[1]}x{shape[0]}",
                   "-r", str(fps), "-i", "-", *form.arguments, str(temp)]
        with _encoding(command, path) as stream:
            def write_padded(frame: np.ndarray) -> None:
                missing = [(0, want - have) for want, have in zip(shape, frame.shape, strict=False)]
                stream(np.pad(frame, [*missing, (0, 0)], mode="edge"))
            yield write_padded


@contextlib.contextmanager
def _png_folder(path: str) -> Iterator[Write]:
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"{path}: this folder is not empty, and old frames would mix with new ones: name a new folder")
    with atomic_folder(path) as temp:
        count = 0

        def write(frame: np.ndarray) -> None:
            nonlocal count
            PIL.Image.fromarray(frame).save(temp / f"frame{count:06d}.png", compress_level=1)
            count += 1
        yield write


def _ffmpeg(path: str) -> str:
    """The program. Raises UserError: it is not installed."""
    try:
        import imageio_ffmpeg
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as err:
        raise UserError(f"{path}: needs the package imageio-ffmpeg: pip install imageio-ffmpeg, or name a folder for "
                        "PNG frames") from err


@contextlib.contextmanager
def _encoding(command: list[str], path: str) -> Iterator[Write]:
    """Start the encoder for the block and hand it frames. Raises UserError if it does not succeed."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        stream = process.stdin
        assert stream is not None           # It was asked for.

        def write(frame: np.ndarray) -> None:
            stream.write(frame.tobytes())
        try:
            try:
                yield write
                stream.close()              # What it holds back is written now.
            except BrokenPipeError:         # The encoder has ended: what it said tells why.
                pass
            code = process.wait()
        finally:
            process.kill()                  # After an error in the block. A process that has ended does not mind.
            process.wait()
            with contextlib.suppress(OSError):
                stream.close()
        if code != 0:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").splitlines() or [f"exit code {code}"]
            said = re.sub(r"^(\[[^]]*\] *)+", "", printable(lines[0]))[:300]       # Which part of the encoder said it.
            raise UserError(f"{path}: the encoder failed ({said}): make room on the disk, or ask for another format")
