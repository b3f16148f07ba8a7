"""dataset_tool.py: transforms, pyramids, continuing, parallel work, labels from files, the report, verify, faults."""
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import dataset_tool
from data_prep import job, parallel, sinks
from data_prep.images import Plan, convert
from data_prep.journal import journal_path
from data_prep.transforms import TRANSFORMS, Size
from dnnlib import UserError
from tests.data_prep.archives import ilsvrc_tar, imagenet_files
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from tests.data_prep.test_dataset_tool import made, photos, refused, run
from training.data import stores
from training.data.images import decode
from training.data.report import read_report
from training.dataset import ImageDataset

ROOT = Path(dataset_tool.__file__).parent
LANCZOS = PIL.Image.Resampling.LANCZOS


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out" / "set.zip"


def only_image(path):
    """Pixels of the first image, [H, W, 3]."""
    dataset = ImageDataset(path)
    image = dataset[0][0].transpose(1, 2, 0)
    dataset.close()
    return image

#----------------------------------------------------------------------------
# Transforms.

def wide_image(width=50, height=30):
    return PIL.Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8))


def test_center_crop_dhariwal(tmp_path, dest):
    image = wide_image()
    source = write_folder(tmp_path / "s", {"a.png": encoded(image)})
    made(source=source, dest=dest, transform="center-crop-dhariwal", resolution=8)
    # 30 -> 15 by one box halving (15 < 2 * 8), then bicubic to a short side of 8, then the central 8 x 8.
    half = image.resize((25, 15), PIL.Image.Resampling.BOX)
    small = half.resize((round(25 * 8 / 15), 8), PIL.Image.Resampling.BICUBIC)
    left = (small.width - 8) // 2
    assert np.array_equal(only_image(dest), np.asarray(small.crop((left, 0, left + 8, 8))))
    made("--overwrite", source=source, dest=dest, transform="center-crop", resolution=8)
    assert not np.array_equal(only_image(dest), np.asarray(small.crop((left, 0, left + 8, 8))))


def test_center_crop_wide(tmp_path, dest):
    tall = wide_image(30, 50)
    source = write_folder(tmp_path / "s", {"a.png": encoded(tall)})
    made(source=source, dest=dest, transform="center-crop-wide", resolution="16x8")
    image = only_image(dest)
    assert image.shape == (16, 16, 3)
    assert not image[:4].any()
    assert not image[12:].any()
    assert np.array_equal(image[4:12], np.asarray(tall.crop((0, 17, 30, 32)).resize((16, 8), LANCZOS)))
    assert read_report(dest)["shown"] == "16x8"
    refused(source=source, dest=dest.with_name("x"), transform="center-crop-wide", resolution=16,
            match=["wider than high", "--resolution=16x9"])
    refused(source=source, dest=dest.with_name("x"), transform="center-crop", resolution="16x8", match=["not square"])


def test_fit(tmp_path, dest):
    image = wide_image(40, 20)
    source = write_folder(tmp_path / "s", {"a.png": encoded(image)})
    made(source=source, dest=dest, fit="squash", resolution=8)
    assert np.array_equal(only_image(dest), np.asarray(image.resize((8, 8), LANCZOS)))
    made("--overwrite", source=source, dest=dest, fit="pad", resolution=8)
    padded = only_image(dest)
    assert np.array_equal(padded[2:6], np.asarray(image.resize((8, 4), LANCZOS)))
    assert not padded[:2].any()
    assert not padded[6:].any()
    with zipfile.ZipFile(dest) as archive:
        assert json.loads(archive.read("dataset.json"))["source_sizes"] == [[40, 20]]       # To undo it.
    made("--overwrite", source=source, dest=dest, fit="crop", resolution=8)
    with zipfile.ZipFile(dest) as archive:
        assert "source_sizes" not in json.loads(archive.read("dataset.json"))
    assert np.array_equal(only_image(dest), np.asarray(image.crop((10, 0, 30, 20)).resize((8, 8), LANCZOS)))
    refused("--overwrite", source=source, dest=dest, fit="pad", transform="center-crop", resolution=8,
            match=["--fit=pad", "--transform=center-crop"])


@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (5, 3), (64, 64), (129, 63)])
def test_every_transform_takes_every_shape(transform, shape):
    size = Size(16, 8) if transform == "center-crop-wide" else Size(16, 16)
    outcome = convert(Plan((size,), transform), "x", encoded(wide_image(*shape)))
    assert outcome.size == (16, 16)


def test_grayscale(tmp_path, dest):
    source = write_folder(tmp_path / "s", {"a.png": encoded(pixels(0)), "g.png": encoded(pixels(0)[:, :, 0])})
    output = made(source=source, dest=dest, grayscale="drop")
    assert "1 images of 8x8" in output
    assert "1 grayscale files left out" in output
    assert read_report(dest)["dropped_grayscale"] == 1
    imagenet = write_folder(tmp_path / "i", {f"n01440764/{name}": (source / name).read_bytes()
                                             for name in ("a.png", "g.png")})
    assert "1 images of" in made("--overwrite", source=imagenet, dest=dest)
    assert "2 images of" in made("--overwrite", source=imagenet, dest=dest, grayscale="rgb")

#----------------------------------------------------------------------------
# Pyramids.

@pytest.mark.parametrize("transform", ["center-crop", "center-crop-dhariwal", "pad"])
def test_pyramid_equals_single_runs(tmp_path, transform):
    source = ilsvrc_tar(tmp_path / "ILSVRC2012_img_train.tar", imagenet_files(size=20))
    output = made(source=source, dest=tmp_path / "in", resolutions="4,8,16,32", transform=transform)
    for resolution in (4, 8, 16, 32):
        single = tmp_path / "single" / f"in{resolution}.zip"
        made(source=source, dest=single, resolution=resolution, transform=transform)
        assert single.read_bytes() == (tmp_path / f"in{resolution}.zip").read_bytes()
        assert f"in{resolution}.zip: 9 images of {resolution}x{resolution} pixels, 3 classes" in output
    assert "enlarged" not in read_report(tmp_path / "in8.zip")["conversions"]
    assert read_report(tmp_path / "in32.zip")["conversions"]["enlarged"] == 9


@pytest.mark.parametrize("name", ["set", "set.zip", "set{resolution}.zip", "set{resolution}"])
def test_names_of_a_pyramid(tmp_path, name):
    made(source=photos(tmp_path / "s", ["a.png"]), dest=tmp_path / name, resolutions="4,8")
    suffix = "" if name == "set{resolution}" else ".zip"
    assert {p.name for p in tmp_path.iterdir()} == {"s", f"set4{suffix}", f"set8{suffix}"}


def test_pyramids_that_cannot_be(tmp_path):
    source = photos(tmp_path / "s", ["a.png"])
    refused(source=source, dest=tmp_path / "x", resolutions="4,8,4", match=["--resolutions=4,8,4: names a size twice"])
    refused(source=source, dest=tmp_path / "x", resolutions="4,12", match=["--resolution=12", "such as 8"])
    refused(source=source, dest=f"{tmp_path}/x/", resolutions="4,8", match=["give the beginning of the names"])
    refused(source=source, dest=tmp_path / "x", resolutions="4", resolution=8, match=["give one of them"])
    (tmp_path / "x8.zip").write_text("old")
    refused(source=source, dest=tmp_path / "x", resolutions="4,8", match=["x8.zip: exists already"])
    assert not (tmp_path / "x4.zip").exists()

#----------------------------------------------------------------------------
# Archives written by hand.

def test_zip64(tmp_path, monkeypatch):
    """More members and larger offsets than the old format holds; Python's reader is the judge."""
    path = tmp_path / "big.zip"
    arrays = (sinks.array.array("Q"), sinks.array.array("L"))
    sink = sinks.ZipSink(path, *arrays)
    for i in range(70_000):
        sink.write(b"%d" % i)
    sink.seal({"dataset.json": b"{}"})
    sink.close()
    sinks.publish(path)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 70_001
        assert archive.read(sinks.image_name(69_999)) == b"69999"
        assert archive.read("dataset.json") == b"{}"
    # The same with limits as if 16 bits were 8 and 32 bits were 12: every field takes its long form.
    monkeypatch.setattr(sinks, "LIMIT_32", 1 << 12)
    entry = sinks._directory_entry("a", 3, 4, 5000)
    assert entry.endswith(b"a" + b"\1\0\x08\0" + (5000).to_bytes(8, "little"))


def test_offsets_beyond_4_gib(tmp_path):
    path = tmp_path / "big.zip"
    sizes, crcs = sinks.array.array("Q"), sinks.array.array("L")
    sink = sinks.ZipSink(path, sizes, crcs)
    sink.write(b"first")
    mark = sink.sync()
    sink.close()
    # As if two images of 3 GiB had been written: holes, which take no space.
    partial = sinks.partial_path(path)
    sizes.extend([3 << 30] * 2)
    crcs.extend([0] * 2)
    with open(partial, "r+b") as f:
        f.truncate(mark + 2 * (30 + len(sinks.image_name(1)) + (3 << 30)))
    sink = sinks.ZipSink(path, sizes, crcs, partial.stat().st_size)
    sink.write(b"fourth")
    sink.seal({"dataset.json": b"{}"})
    sink.close()
    with zipfile.ZipFile(partial) as archive:
        names = archive.namelist()
        assert [archive.read(names[i]) for i in (0, 3, 4)] == [b"first", b"fourth", b"{}"]
        assert archive.getinfo(names[3]).header_offset > 6 << 30
    partial.unlink()

#----------------------------------------------------------------------------
# Continuing.

KILLED = """
import sys, time
from data_prep import job, sinks
job.COMMIT_IMAGES = 7
write = sinks.{sink}.write
count = 0
def slow(self, data):
    global count
    count += 1
    if count == {stop}:
        print("here", flush=True)
        time.sleep(60)
    write(self, data)
sinks.{sink}.write = slow
import dataset_tool
dataset_tool.main(sys.argv[1:])
"""


def killed(stop, args, sink="ZipSink"):
    """Run the tool until it writes its image number `stop`, then kill -9."""
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(stop=stop, sink=sink), *args], cwd=ROOT,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def many(tmp_path, count=40):
    content = {f"{'abc'[i % 3]}/{i:03d}.png": encoded(pixels(i, 12)) for i in range(count)}
    content["a/001bad.png"] = b"junk"
    return write_zip(tmp_path / "source.zip", content)


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_bytes(tmp_path, monkeypatch):
    source = many(tmp_path)
    args = [f"--source={source}", "--resolutions=4,8", "--fit=pad", f"--dest={tmp_path}/k/set"]
    made(source=source, resolutions="4,8", fit="pad", dest=tmp_path / "whole" / "set")
    killed(2 * 17, args)            # Two writes per file: in the third block.
    names = {p.name for p in (tmp_path / "k").iterdir()}
    assert names == {".set4.zip.journal", ".set4.zip.partial", ".set8.zip.partial"}
    killed(2 * 15, [*args, "--workers=2"])      # Broken off once more, 14 files further.
    code, output = run(*args)
    assert code == 0
    assert "Continuing at file 28 of 41" in output
    assert "40 images of 8x8 pixels, 3 classes" in output
    for name in ("set4.zip", "set8.zip"):
        assert (tmp_path / "k" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in (tmp_path / "k").iterdir()} == {"set4.zip", "set8.zip"}


def test_killed_run_into_a_folder(tmp_path):
    source = many(tmp_path, 20)
    made(source=source, resolution=8, dest=tmp_path / "whole")
    args = [f"--source={source}", "--resolution=8", f"--dest={tmp_path}/k/set"]
    killed(17, args, "FolderSink")
    assert run(*args)[0] == 0
    listing = {p.relative_to(tmp_path / "k" / "set"): p.read_bytes()
               for p in (tmp_path / "k" / "set").rglob("*") if p.is_file()}
    assert listing == {p.relative_to(tmp_path / "whole"): p.read_bytes()
                       for p in (tmp_path / "whole").rglob("*") if p.is_file()}


EVERYWHERE = """
import os, sys, pathlib
import PIL.Image
import dataset_tool
PIL.Image.init()                        # Once for all children.
source, place = sys.argv[1], pathlib.Path(sys.argv[2])
from data_prep import job, sinks
job.COMMIT_IMAGES = 3

def run(folder, die_at=0):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    count = 0
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == die_at:
                os._exit(9)             # As kill -9: nothing is flushed, nothing is tidied up.
            result = function(*args, **kwargs)
            count += 1
            if count == die_at:
                os._exit(9)
            return result
        return call
    os.fsync, os.replace = deadly(lambda fd: None), deadly(os.replace)      # Kills need no disk, and disks are slow.
    pathlib.Path.unlink = deadly(pathlib.Path.unlink)
    sinks.ZipSink.write = deadly(sinks.ZipSink.write)
    sinks.ZipSink.seal = deadly(sinks.ZipSink.seal)
    try:
        dataset_tool.main([f"--source={source}", "--resolutions=4,8", f"--dest={folder}/set"], standalone_mode=False)
    except BaseException:
        os._exit(1)
    os._exit(0)

assert run(place / "whole") == 0
whole = {p.name: p.read_bytes() for p in (place / "whole").iterdir()}
n = 0
while True:
    n += 1
    code = run(place / str(n), n)
    if code == 0:
        break
    assert code == 9, (n, code)
    # The same command again. Where everything was done but the journal's end, it says that there is nothing to do.
    again = run(place / str(n))
    found = {p.name: p.read_bytes() for p in (place / str(n)).iterdir()}
    assert found == whole, (n, again, sorted(found))
print(n, flush=True)
"""


@pytest.mark.slow
def test_killed_at_every_write_sync_and_rename(tmp_path):
    source = many(tmp_path, 5)
    done = subprocess.run([sys.executable, "-c", EVERYWHERE, str(source), str(tmp_path)], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 40


class Broken(BaseException):
    """Stands for a power cut at a chosen place."""


@pytest.fixture
def small_commits(monkeypatch):
    monkeypatch.setattr(job, "COMMIT_IMAGES", 5)


def broken_off(tmp_path, monkeypatch, after, args, error=None):
    """Run in this process until the image number `after`, where writing fails."""
    write, count = sinks.ZipSink.write, [0]

    def failing(self, data):
        count[0] += 1
        if count[0] > after:
            raise error or Broken
        write(self, data)

    with monkeypatch.context() as m:
        m.setattr(sinks.ZipSink, "write", failing)
        if error is None:
            with pytest.raises(Broken):
                dataset_tool.main(args, standalone_mode=False)
            return ""
        code, output = run(*args)
        assert code == 2
        return output


def test_disk_full_then_room(tmp_path, monkeypatch, small_commits):
    source = many(tmp_path, 20)
    made(source=source, resolution=8, dest=tmp_path / "whole.zip")
    args = [f"--source={source}", "--resolution=8", f"--dest={tmp_path}/set.zip"]
    output = broken_off(tmp_path, monkeypatch, 12, args, OSError(errno.ENOSPC, "No space left on device"))
    assert f"Error: --dest={tmp_path}/set.zip: the disk is full: make room, then run the same" in output
    assert not (tmp_path / "set.zip").exists()
    code, output = run(*args)
    assert code == 0
    assert "Continuing at file 10 of 21" in output
    assert (tmp_path / "set.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_disk_full_at_once_leaves_nothing(tmp_path, monkeypatch):
    args = [f"--source={many(tmp_path, 3)}", "--resolution=8", f"--dest={tmp_path}/set.zip"]
    broken_off(tmp_path, monkeypatch, 1, args, OSError(errno.ENOSPC, "No space left on device"))
    assert [p.name for p in tmp_path.iterdir()] == ["source.zip"]


def test_a_journal_that_was_cut_off(tmp_path, monkeypatch, small_commits):
    source = many(tmp_path, 20)
    made(source=source, resolution=8, dest=tmp_path / "whole.zip")
    args = [f"--source={source}", "--resolution=8", f"--dest={tmp_path}/set.zip"]
    broken_off(tmp_path, monkeypatch, 17, args)
    journal = journal_path(tmp_path / "set.zip")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    code, output = run(*args)
    assert code == 0
    assert "Continuing at file 10 of 21" in output
    assert (tmp_path / "set.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()


def test_another_run_does_not_take_over(tmp_path, monkeypatch, small_commits):
    source = many(tmp_path, 20)
    args = [f"--source={source}", "--resolution=8", f"--dest={tmp_path}/set.zip"]
    broken_off(tmp_path, monkeypatch, 17, args)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    refused(*args, "--fit=crop", match=["an unfinished run is there that differs in transform", "--restart"])
    os.utime(source, (1, 1))
    refused(*args, match=["differs in stamp", "--restart"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    made(*args, "--restart", "--fit=crop")
    assert {p.name for p in tmp_path.iterdir()} >= {"source.zip", "set.zip"}
    assert not journal_path(tmp_path / "set.zip").exists()


def test_broken_off_between_two_names(tmp_path, monkeypatch):
    """The first of two archives has its name, the second not yet."""
    source = many(tmp_path, 6)
    made(source=source, resolutions="4,8", dest=tmp_path / "whole")
    publish = sinks.publish

    def fails(dest):
        if "8" in dest.name:
            raise Broken
        publish(dest)

    args = [f"--source={source}", "--resolutions=4,8", f"--dest={tmp_path}/set"]
    with monkeypatch.context() as m:
        m.setattr(sinks, "publish", fails)
        with pytest.raises(Broken):
            dataset_tool.main(args, standalone_mode=False)
    assert (tmp_path / "set4.zip").exists()
    assert not (tmp_path / "set8.zip").exists()
    made(*args)
    for size in (4, 8):
        assert (tmp_path / f"set{size}.zip").read_bytes() == (tmp_path / f"whole{size}.zip").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".set")]


def test_interrupted_by_the_keyboard(tmp_path, monkeypatch, small_commits):
    args = [f"--source={many(tmp_path, 20)}", "--resolution=8", f"--dest={tmp_path}/set.zip"]
    monkeypatch.setattr(sinks.ZipSink, "seal", lambda _self, _extra: (_ for _ in ()).throw(KeyboardInterrupt))
    code, output = run(*args)
    assert code == 1
    assert "Unfinished: the same command continues" in output
    monkeypatch.undo()
    assert "Continuing at file 20 of 21" in made(*args)


def test_two_runs_at_once(tmp_path):
    source, dest = many(tmp_path, 3), tmp_path / "set.zip"
    with job.open_journal(dest):
        refused(source=source, dest=dest, resolution=8, match=["another run is making it right now"])


def test_strict_keeps_what_is_done(tmp_path, small_commits):
    content = {f"{i:02d}.png": encoded(pixels(i)) for i in range(12)}
    source = write_folder(tmp_path / "s", {**content, "11.png": b"junk"})
    refused("--strict", source=source, dest=tmp_path / "set.zip", match=["11.png: cannot be converted"])
    (source / "11.png").write_bytes(content["11.png"])
    assert "Continuing at file 10 of 12" in made("--strict", source=source, dest=tmp_path / "set.zip")
    made(source=source, dest=tmp_path / "whole.zip")
    assert (tmp_path / "set.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()

#----------------------------------------------------------------------------
# Parallel work.

def test_results_come_in_order_and_input_is_read_only_a_little_ahead():
    read, done = [], 0

    def items():
        for i in range(60):
            read.append(i)
            yield i

    for number, result in enumerate(parallel.ordered_map(abs, items(), 2)):
        assert result == number
        done = number + 1
        assert len(read) <= done + parallel.CHUNKS_PER_WORKER * 2
    assert done == 60


def test_a_worker_that_is_killed(tmp_path):
    with pytest.raises(parallel.Interrupted, match="take fewer workers"):
        list(parallel.ordered_map(os._exit, [1], 2))


def test_chunks_are_bounded():
    assert [len(c) for c in parallel.chunks(range(40), lambda _i: 1)] == [16, 16, 8]
    assert [len(c) for c in parallel.chunks(range(5), lambda _i: parallel.CHUNK_BYTES // 2)] == [2, 2, 1]


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    code = ("import os, time\nfrom data_prep.parallel import ordered_map\n"
            "def pid(_i):\n    return os.getpid()\n"
            "if __name__ == '__main__':\n"
            "    steps = ordered_map(pid, range(100), 2)\n    print(next(steps), flush=True)\n    time.sleep(60)\n")
    script = tmp_path / "parent.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(600):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")

#----------------------------------------------------------------------------
# Labels from files.

def label_source(tmp_path):
    return photos(tmp_path / "s", [f"in/{i}.jpg.png" if i == 9 else f"in/{i}.png" for i in range(8)])


def labels_of(dest):
    dataset = ImageDataset(dest, use_labels=True)
    found = dataset.labels.tolist(), dataset.class_names
    dataset.close()
    return found


@pytest.mark.parametrize("form", ["in/{}.png", "in\\{}.png", "in/{}", "{}.png", "{}"])
@pytest.mark.parametrize("header", [None, "file,label", "id,breed", "x,Filename,Class"])
def test_csv_labels(tmp_path, dest, form, header):
    rows = [[form.format(i), "cat" if i % 2 else "dog"] for i in range(8)]
    path = tmp_path / "l.csv"
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        if header is not None:
            writer.writerow(header.split(","))
        writer.writerows([["?", *row] for row in rows] if header and header.startswith("x") else rows)
    made(source=label_source(tmp_path), dest=dest, labels=path)
    assert labels_of(dest) == ([1, 0] * 4, ["cat", "dog"])


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("header", [[], ["file;label"]])
def test_other_delimiters(tmp_path, dest, delimiter, header):
    lines = [line.replace(";", delimiter) for line in [*header, *(f"in/{i}.png;{i % 3}" for i in range(8))]]
    (tmp_path / "l.csv").write_text("\n".join(lines))
    made(source=label_source(tmp_path), dest=dest, labels=tmp_path / "l.csv")
    assert labels_of(dest)[0] == [i % 3 for i in range(8)]


def test_a_semicolon_in_a_name(tmp_path, dest):
    source = photos(tmp_path / "s", ["a;1.png", "b.png"])
    (tmp_path / "l.csv").write_text("a;1.png,0\nb.png,1\n")
    made(source=source, dest=dest, labels=tmp_path / "l.csv")
    assert labels_of(dest)[0] == [0, 1]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_of_another_unicode_form(tmp_path, dest, forms):
    """As a file that was copied from a Mac has them: files, folders and classes."""
    here, there = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    source = photos(tmp_path / "s", [f"{here}/1.png", f"{there}/2.png", f"x/{here}.png"])
    assert "2 classes" in made(source=source, dest=dest)
    assert labels_of(dest) == ([0, 0, 1], ["caf\u00e9", "x"])
    names = [f"{there}/1.png", f"{here}/2.png", f"x/{there}.png"]
    (tmp_path / "l.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate(names)), encoding="utf-8")
    made("--overwrite", source=source, dest=dest, labels=tmp_path / "l.csv")
    assert sorted(labels_of(dest)[0]) == [0, 1, 2]
    (source / "dataset.json").write_text(json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
    made("--overwrite", source=source, dest=dest)
    assert sorted(labels_of(dest)[0]) == [0, 1, 2]
    assert sorted(ImageDataset(source, use_labels=True).labels.tolist()) == [0, 1, 2]


def test_numbers_in_label_files_are_numbers(tmp_path, dest):
    """Eleven classes: in the order of text 10 would come before 2. A whole float is the number."""
    source = photos(tmp_path / "s", [f"{i:02d}.png" for i in range(11)])
    for name, text in (("l.csv", "".join(f"{i:02d}.png,{i}.0\n" for i in range(11))),
                       ("a.json", json.dumps({f"{i:02d}.png": float(i) for i in range(11)})),
                       ("b.json", json.dumps({f"{i:02d}.png": [str(i)] for i in range(11)}))):
        (tmp_path / name).write_text(text)
        made("--overwrite", source=source, dest=dest, labels=tmp_path / name)
        assert labels_of(dest) == (list(range(11)), [str(i) for i in range(11)])


def test_folders_that_are_numbers(tmp_path, dest):
    """In the order of numbers; their names stay, so that a subset stays one. Classes are listed with their counts."""
    source = photos(tmp_path / "s", [f"{name}/{k}.png" for name in ("10", "2", "1") for k in range(2)] + ["2/x.png"])
    assert "classes with their numbers of images: 0 = 1 (2), 1 = 2 (3), 2 = 10 (2)" in made(source=source, dest=dest)
    assert labels_of(dest) == ([0, 0, 2, 2, 1, 1, 1], ["1", "2", "10"])


@pytest.mark.parametrize("content", [
    {"labels": [[f"in/{i}.png", i % 3] for i in range(8)], "classes": ["a", "b", "c", "d"]},
    [[f"in/{i}.png", i % 3] for i in range(8)],
    {f"in/{i}.png": i % 3 for i in range(9)},
])
def test_json_labels(tmp_path, dest, content):
    (tmp_path / "l.json").write_text(json.dumps(content))
    made(source=label_source(tmp_path), dest=dest, labels=tmp_path / "l.json")
    labels, names = labels_of(dest)
    assert labels == [i % 3 for i in range(8)]
    assert names == (["a", "b", "c", "d"] if "classes" in content else ["0", "1", "2"])


@pytest.mark.parametrize(("text", "match"), [
    ("in/0.png,0\n", ["no label for 7 of 8 images: in/1.png", "in/5.png and 2 more", "--no-labels"]),
    ("".join(f"in/{i}.png,{i * 2}\n" for i in range(8)),
     ["labels go up to 14", "7 classes have no images: 1, 3, 5, 7, 9", "and 2 more", "--allow-gaps"]),
    ("".join(f"in/{i}.png,{-1 if i else 0}\n" for i in range(8)), ["7 labels are wrong: in/1.png (-1)", "and 2 more"]),
    ("".join(f"in/{i}.png,{'x' if i else 0}\n" for i in range(8)), ["1 of 8 labels are no class names"]),
    ("".join(f"C:\\me\\{i}.png,0\n" for i in range(8)),
     ["8 names lead out of the data set: C:\\me\\0.png", "and 3 more"]),
    ("".join(f"../{i}.png,0\n" for i in range(8)), ["8 names lead out of the data set"]),
    ("other.png,0\n", ["names none of the images: it lists other.png, the source holds in/0.png"]),
    ("in/0.png,0\nin/0.png,1\n", ["1 files have two labels: in/0.png (0 and 1)"]),
    ("in/0.png,\n", ["1 lines have no label: in/0.png,"]),
    ("a,b,c\n", ["3 columns"]),
    ("in/0.png,cat\nin/1.png,cat,dog\n", ["1 lines have more values than the first, which has 2: in/1.png,cat,dog",
                                          "several labels per image are not supported"]),
    ("".join(f"in/{i}.png,{i} 1\n" for i in range(8)), ["8 labels hold more than one value: '0 1', '1 1'",
                                                        "not supported: keep one for each image", "--no-labels"]),
    ("".join(f"in/{i}.png,{['cat', 'dog', 'cat|dog'][i % 3]}\n" for i in range(8)),
     ["1 labels hold more than one value: 'cat|dog'"]),
    ("".join(f"in/{i}.png,{i / 2}\n" for i in range(8)), ["4 labels are wrong: in/1.png ('0.5')"]),
    ("", ["is empty"]),
])
def test_wrong_label_files(tmp_path, dest, text, match):
    (tmp_path / "l.csv").write_text(text)
    refused(source=label_source(tmp_path), dest=dest, labels=tmp_path / "l.csv", match=["--labels=", *match])


def test_ambiguous_and_broken_label_files(tmp_path, dest):
    source = photos(tmp_path / "s", ["a/1.png", "b/1.png"])
    for name, text, match in (("l.csv", "1.png,0\n", "1 names fit several images: 1.png"),
                              ("l.json", "{", "not valid JSON"),
                              ("l.json", "[]", "lists no labels"), ("l.json", "3", "lists no labels"),
                              ("l.json", '[["a", null]]', "must look like"), ("b.json", None, "cannot be read")):
        if text is not None:
            (tmp_path / name).write_text(text)
        refused(source=source, dest=dest, labels=tmp_path / name, match=[match])
    (tmp_path / "l.csv").write_bytes(b"\xff\xfe\0")
    refused(source=source, dest=dest, labels=tmp_path / "l.csv", match=["UTF-8"])
    refused("--no-labels", source=source, dest=dest, labels="x", match=["give one of them"])


def test_wrong_dataset_json_lists_the_first_five(tmp_path, dest):
    wrong = {"labels": [[f"00000/img{i:08d}.png", "x" if i else 3] for i in range(8)]}
    for meta, match in ((wrong, ["1 of 8 labels are no class names"]),
                        ({"labels": [[f"/abs/{i}.png", 0] for i in range(8)]}, ["8 names lead out", "and 3 more"]),
                        ({"labels": ["a"] * 9}, ["9 entries", "and 4 more"]),
                        ({"labels": [[f"00000/img{i:08d}.png", 0.5] for i in range(8)]}, ["8 labels are wrong"]),
                        (metadata(8, classes=["a", "b"]), ["2 labels are wrong", "from 0 to 1"])):
        refused(source=write_zip(tmp_path / "s.zip", files(8), meta), dest=dest, match=["s.zip: dataset.json", *match])

#----------------------------------------------------------------------------
# The report, and verify.

def test_report(tmp_path, dest):
    content = {**{f"{c}/{i}.png": encoded(pixels(i)) for c in "ab" for i in range(3)},
               "b/bad.png": b"junk", "c/gray.png": encoded(pixels(0)[:, :, 0])}
    made(source=write_zip(tmp_path / "s.zip", content), dest=dest)
    with zipfile.ZipFile(dest) as archive:
        report = json.loads(archive.read("report.json"))
    assert report["images_per_class"] == {"a": 3, "b": 3, "c": 1}
    assert report["skipped"] == [{"file": "b/bad.png", "reason": "not an image, or damaged"}]
    assert report["conversions"] == {"mode L converted": 1}
    assert (report["resolution"], report["transform"], report["num_images"]) == (8, None, 7)
    assert report["versions"]["pillow"] == PIL.__version__
    assert len(report["content_sha256"]) == 64
    assert not list(dest.parent.glob("*.report.json"))
    assert str(tmp_path) not in json.dumps(report)
    made("--no-labels", source=tmp_path / "s.zip", dest=dest.with_name("n.zip"))
    assert read_report(dest.with_name("n.zip"))["content_sha256"] != report["content_sha256"]


def test_reports_of_older_versions_are_read(tmp_path):
    old = write_zip(tmp_path / "old.zip", files())
    assert read_report(old) is None
    (tmp_path / "old.zip.report.json").write_text('{"num_images": 6}')
    assert read_report(old) == {"num_images": 6}
    made("--overwrite", source=photos(tmp_path / "s", ["a.png"]), dest=old)
    assert read_report(old)["num_images"] == 1
    assert not (tmp_path / "old.zip.report.json").exists()


@pytest.mark.parametrize(("name", "workers"), [("set.zip", 1), ("set.zip", 2), ("set", 1)])
def test_verify_whole(tmp_path, name, workers):
    made(source=write_folder(tmp_path / "s", files(9), metadata(9)), dest=tmp_path / name)
    code, output = run("verify", str(tmp_path / name), workers=workers)
    assert (code, output) == (0, f"{tmp_path / name}: 9 images of 8x8 pixels, 3 classes: all can be decoded, "
                                 f"content as written")


def test_verify_names_the_bad_ones(tmp_path):
    content = {**files(4), "00000/junk.png": b"junk", "00000/small.png": encoded(pixels(0, 4)),
               "00000/wide.png": encoded(np.zeros((4, 8, 3), np.uint8))}
    path = write_zip(tmp_path / "s.zip", content)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)
    code, output = run("verify", str(path))
    assert code == 2
    for name, reason in (("img00000000.png", "damaged here"), ("junk.png", "not an image"),
                         ("small.png", "4x4 pixels, but 00000/img00000001.png has 8x8"), ("wide.png", "8x4 pixels")):
        assert any(name in part and reason in part for part in output.split(f"{path}: 00000/")), (name, output)
    assert f"Error: {path}: 4 of 7 images are bad" in output


def test_verify_finds_changed_content(tmp_path):
    made(source=write_folder(tmp_path / "s", files(), metadata()), dest=tmp_path / "set")
    (tmp_path / "set" / "00000" / "img00000002.png").write_bytes(encoded(pixels(99)))
    code, output = run("verify", str(tmp_path / "set"))
    assert code == 2
    assert "images or labels are not those that were written" in output
    (tmp_path / "set" / "00000" / "img00000002.png").write_bytes(encoded(pixels(2), "PNG", compress_level=9))
    assert run("verify", str(tmp_path / "set"))[0] == 0         # Packed in another way, the pixels are the same.
    labels = json.loads((tmp_path / "set" / "dataset.json").read_text())
    labels["labels"][0][1] = 2
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(labels))
    assert run("verify", str(tmp_path / "set"))[0] == 2


def test_verify_without_a_report(tmp_path):
    code, output = run("verify", str(write_zip(tmp_path / "s.zip", files(), metadata())))
    assert code == 0
    assert "no hash of the content" in output
    refused("verify", str(tmp_path / "none.zip"), match=["no such archive or folder"])
    refused("verify", str(write_zip(tmp_path / "p.zip", files(), metadata(3))), match=["no label for 3 of 6"])

#----------------------------------------------------------------------------
# Faults.

def test_decompression_bomb(tmp_path, dest):
    bomb = encoded(PIL.Image.new("1", (20_000, 10_000)))       # 200 million pixels in 25 kB.
    assert len(bomb) < 100_000
    output = made(source=write_folder(tmp_path / "s", {"a.png": encoded(pixels(0)), "bomb.png": bomb}), dest=dest)
    assert "bomb.png: more than the 89478485 pixels that one image may have" in output
    with pytest.raises(ValueError, match="more than the"):
        decode(bomb)


def test_zip_bomb_is_not_unpacked(tmp_path, dest, monkeypatch):
    monkeypatch.setattr(stores, "MAX_FILE_BYTES", 1 << 20)
    source = write_zip(tmp_path / "s.zip", {"a.png": encoded(pixels(0)), "b.png": bytes(3 << 20)},
                       method=zipfile.ZIP_DEFLATED)
    assert "b.png: 3.0 MiB, more than the 1.0 MiB that one image may have" in made(source=source, dest=dest)


def test_file_names_that_are_no_text(tmp_path, dest):
    folder = os.fsencode(write_folder(tmp_path / "s", {"a/1.png": encoded(pixels(0))}))
    os.mkdir(folder + b"/b\xff")
    for name, data in ((b"/b\xff/1.png", encoded(pixels(1))), (b"/b\xff/2\xfe.png", b"junk")):
        with open(folder + name, "wb") as f:
            f.write(data)
    assert "s/b\\xff/2\\xfe.png: not an image" in made(source=tmp_path / "s", dest=dest)
    dataset = ImageDataset(dest, use_labels=True)
    assert dataset.class_names == ["a", "b\\xff"]
    dataset.close()
    assert read_report(dest)["skipped"][0]["file"] == "b\\xff/2\\xfe.png"


def test_help_of_both_commands():
    assert "verify DATA" in run("--help")[1]
    assert "Decode every image" in run("verify", "--help")[1]
    assert run()[0] in (0, 2)


def test_user_errors_from_python(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        job.make_datasets(job.Job(str(tmp_path / "none"), (tmp_path / "x.zip",)))
    assert list(tmp_path.iterdir()) == []
