# SPDX-License-Identifier: Apache-2.0
"""The list of an archive: against zipfile, kept in a file, shared, and in the face of damage."""
import io
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from dnnlib import UserError
from tests.data_prep.samples import encoded, files, metadata, pixels, write_zip
from training.data import zip_index
from training.data.images import open_image
from training.data.stores import ZipStore
from training.data.zip_directory import read_directory
from training.data.zip_index import Names, index_files, load_index, make_index, open_index, prepare_index
from training.dataset import ImageDataset


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def kept(monkeypatch):
    """Small archives get an index file, too."""
    monkeypatch.setattr(zip_index, "MIN_ENTRIES", 1)

#----------------------------------------------------------------------------
# The directory.

def assert_as_zipfile(path):
    """Names, contents and order are those that zipfile sees."""
    with open(path, "rb") as file, zipfile.ZipFile(path) as archive:
        found, infos = read_directory(file), archive.infolist()
        assert found.names == [info.orig_filename for info in infos]
        for name, values in (("header_offset", found.offset), ("compress_size", found.compressed),
                             ("file_size", found.size), ("CRC", found.crc), ("compress_type", found.method),
                             ("flag_bits", found.flags)):
            assert values.tolist() == [getattr(info, name) for info in infos], name
        store = ZipStore(path)
        for i, name in enumerate(store.names):
            assert store.read(i) == archive.read(name)
        store.close()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_as_zipfile_sees_it(tmp_path, method):
    content = {**files(20), "b.png": b"2", "a/": b"", "a/c.png": b"", "note.txt": b"PK\x01\x02 in a file"}
    assert_as_zipfile(write_zip(tmp_path / "a.zip", content, metadata(), method))


def test_unicode_names(tmp_path):
    names = ["caf\u00e9.png", "\u732b/\u72ac.png", "\U0001f431.png", "a.png"]
    path = write_zip(tmp_path / "a.zip", {name: encoded(pixels(i)) for i, name in enumerate(names)},
                     {"labels": [[name, i] for i, name in enumerate(names)]})
    assert_as_zipfile(path)
    dataset = ImageDataset(path, use_labels=True)
    assert [dataset.file_name(i) for i in range(4)] == sorted(names)
    assert dataset.labels.tolist() == [names.index(name) for name in sorted(names)]
    assert np.array_equal(dataset[3][0], pixels(2).transpose(2, 0, 1))
    dataset.close()


def test_names_in_the_old_code_page(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"caf#.png": b"1"})
    path.write_bytes(path.read_bytes().replace(b"caf#", b"caf\x82"))
    assert_as_zipfile(path)
    assert list(ZipStore(path).names) == ["caf\u00e9.png"]


def test_something_in_front_and_a_comment_behind(tmp_path):
    path = write_zip(tmp_path / "a.zip", files())
    path.write_bytes(b"#!/bin/sh\n" * 100 + path.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand " * 1000
    assert_as_zipfile(path)


def test_signatures_inside_names_and_comments(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(5):
            info = zipfile.ZipInfo(f"PK\x01\x02 {i} PK\x01\x02.png")
            info.comment = b"PK\x01\x02" + bytes(60) + b"PK\x01\x02"
            archive.writestr(info, bytes([i]))
    assert_as_zipfile(path)


def test_other_extra_fields(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(5):
            info = zipfile.ZipInfo(f"{i}.png")
            info.extra = struct.pack("<HHL", 0x5455, 4, i) * i + struct.pack("<HH", 0xCAFE, 300) + bytes(300)
            archive.writestr(info, bytes([i]) * i)
    assert_as_zipfile(path)


def zip64_archive(path, monkeypatch, extra_first=b""):
    """An archive whose sizes and places are all written in ZIP64 fields."""
    write_zip(path, files(), metadata())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos, start = archive.infolist(), archive.start_dir
    directory = b""
    for k, info in enumerate(infos):
        values = [(info.file_size, k % 2), (info.compress_size, k % 3 == 0), (info.header_offset, 1)]
        extra = b"".join(struct.pack("<Q", value) for value, is_long in values if is_long)
        extra = extra_first + struct.pack("<HH", 1, len(extra)) + extra
        name = info.filename.encode()
        size, compressed, offset = (0xFFFFFFFF if is_long else value for value, is_long in values)
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, info.CRC, compressed, size,
                                 len(name), len(extra), 0, 0, 0, 0, offset) + name + extra
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(infos), len(infos), len(directory), start)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:start] + directory + end + locator + last)
    return path


@pytest.mark.parametrize("extra_first", [b"", struct.pack("<HHL", 0x5455, 4, 1)])
def test_zip64(tmp_path, monkeypatch, extra_first):
    path = zip64_archive(tmp_path / "a.zip", monkeypatch, extra_first)
    assert_as_zipfile(path)
    dataset = ImageDataset(path, use_labels=True)
    assert np.array_equal(dataset[3][0], pixels(3).transpose(2, 0, 1))
    dataset.close()


@pytest.mark.slow
def test_more_than_65535_files(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(65540):
            archive.writestr(f"{i:05d}.png", b"")
    with open(path, "rb") as file:
        assert len(read_directory(file).names) == 65540
    index = open_index(path)
    assert index.file == path.with_name("a.zip.index")
    assert list(index.names[:2]) == ["00000.png", "00001.png"]
    assert load_index(index.file, index.signature).names == [f"{i:05d}.png" for i in range(65540)]


def test_a_file_behind_4_gib(tmp_path):
    """Sparse: nothing of it is on the disk."""
    path, image = tmp_path / "a.zip", encoded(pixels(7))
    with open(path, "wb") as file:
        file.truncate(5 << 30)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.png", image)
        assert archive.getinfo("x.png").header_offset >= 5 << 30
    dataset = ImageDataset(path)
    assert np.array_equal(dataset[0][0], pixels(7).transpose(2, 0, 1))
    dataset.close()


def end_of(data):
    return data.rindex(b"PK\x05\x06")


@pytest.mark.parametrize(("at", "value", "match"), [
    (8, struct.pack("<HH", 9000, 9000), "speaks of 9000 files, its directory of 6"),
    (10, struct.pack("<H", 9000), "one of several parts"),
    (12, struct.pack("<L", 1 << 30), "cut off"),
    (12, struct.pack("<L", 100), "damaged|cut off"),
    (16, struct.pack("<L", 1 << 31), "cut off"),
])
def test_an_end_that_lies(tmp_path, at, value, match):
    path = write_zip(tmp_path / "a.zip", files())
    data = bytearray(path.read_bytes())
    data[end_of(data) + at:end_of(data) + at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.zip: not a whole zip archive \(.*({match})"):
        make_index(path)


def test_a_member_that_claims_to_be_huge(tmp_path):
    path = write_zip(tmp_path / "a.zip", files())
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 20:at + 28] = struct.pack("<LL", 1 << 31, 1 << 31)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"img00000000\.png lies outside of it"):
        make_index(path)
    data[at + 20:at + 28] = struct.pack("<LL", 100, 0xFFFFFFF0)        # Expands to 4 GiB, so it says.
    path.write_bytes(data)
    with pytest.raises(OSError, match="at most 2000000000 are read"):
        ZipStore(path).read(0)


def test_truncated_anywhere(tmp_path):
    """Whatever is missing at the end, it is a message and no crash."""
    whole = write_zip(tmp_path / "a.zip", files(3), metadata(3)).read_bytes()
    path = tmp_path / "b.zip"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"b\.zip: not a whole zip archive"):
            make_index(path)


def test_names_twice_and_methods(tmp_path):
    path = tmp_path / "a.zip"
    write_zip(path, {"a/x.png": b"1", "a/y.png": b"2"})
    path.write_bytes(path.read_bytes().replace(b"y.png", b"x.png"))
    with pytest.raises(UserError, match=r"holds a/x\.png twice"):
        make_index(path)
    write_zip(path, files(2), None, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match=r"img00000000\.png is neither stored nor deflated \(method 14\): unpack"):
        make_index(path)
    data = bytearray(write_zip(path, files(2)).read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"img00000001\.png is encrypted"):
        make_index(path)

#----------------------------------------------------------------------------
# Names.

def test_packed_names():
    plain = ["a", "", "\u00e9\u732b", "b" * 300]
    names = Names.of(plain)
    assert names == plain
    assert [names[i] for i in range(-4, 4)] == plain * 2
    assert (names[1:], names[::-1], len(names)) == (plain[1:], plain[::-1], 4)
    assert ("a" in names, names.index("\u00e9\u732b")) == (True, 2)
    with pytest.raises(IndexError):
        names[4]
    assert list(Names.of([])) == []

#----------------------------------------------------------------------------
# The file.

def test_kept_and_used(tmp_path, kept, monkeypatch):
    path = write_zip(tmp_path / "a.zip", files(), metadata(classes=["x", "y", "z"]))
    first = ImageDataset(path, use_labels=True, xflip=True)
    monkeypatch.setattr(zip_index, "make_index", lambda path: pytest.fail("listed again"))
    monkeypatch.setattr(zip_index, "parse_metadata", lambda *args: pytest.fail("dataset.json read again"))
    again = ImageDataset(path, use_labels=True, xflip=True)
    assert [again.file_name(i) for i in range(12)] == [first.file_name(i) for i in range(12)]
    assert again.labels.tolist() == first.labels.tolist() == [0, 1, 2] * 4
    assert (again.class_names, again.fingerprint) == (["x", "y", "z"], first.fingerprint)
    assert again.has_labels
    assert all(np.array_equal(again[i][0], first[i][0]) for i in range(12))
    first.close()
    again.close()
    assert (tmp_path / "a.zip.index").is_file()
    assert not (tmp_path / "cache").exists()


def test_fingerprints_in_the_file_are_those_of_a_folder(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", files(), metadata())
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "folder")
    for xflip in (False, True):
        from_file = [ImageDataset(path, xflip=xflip).fingerprint for _ in range(2)]
        assert {*from_file, ImageDataset(tmp_path / "folder", xflip=xflip).fingerprint} == {from_file[0]}


def test_small_archives_leave_no_file(tmp_path):
    ImageDataset(write_zip(tmp_path / "a.zip", files())).close()
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_another_archive_of_that_name(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", files(6))
    assert len(open_index(path).names) == 6
    write_zip(path, files(5))
    assert len(open_index(path).names) == 5
    assert open_index(path).file == tmp_path / "a.zip.index"


def test_a_change_that_keeps_size_and_time(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", {"a.png": b"1"})
    stat = path.stat()
    assert list(open_index(path).names) == ["a.png"]
    write_zip(path, {"b.png": b"1"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert list(open_index(path).names) == ["b.png"]


def test_a_damaged_file_is_made_anew(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", files(), metadata())
    index = open_index(path)
    whole = index.file.read_bytes()
    rng = np.random.RandomState(0)
    for k in range(60):
        damaged = bytearray(whole)
        if k < 50:
            damaged[rng.randint(len(whole))] ^= 1 << rng.randint(8)
        else:
            damaged = damaged[:rng.randint(len(whole))]
        index.file.unlink()
        index.file.write_bytes(damaged)
        assert load_index(index.file, index.signature) is None
    assert open_index(path).names == index.names
    assert index.file.read_bytes() == whole


def test_folders_that_cannot_be_written(tmp_path, kept, monkeypatch):
    path = write_zip(tmp_path / "a.zip", files())
    beside, cached = index_files(path)
    write = zip_index.atomic_file

    def refuse(place):
        if place == beside:
            raise PermissionError(13, "Permission denied")
        return write(place)
    monkeypatch.setattr(zip_index, "atomic_file", refuse)
    assert open_index(path).file == cached
    assert cached.is_file()
    assert open_index(path).file == cached
    cached.unlink()

    def full(place):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(zip_index, "atomic_file", full)
    index = open_index(path)            # Works without.
    assert (index.file, list(index.names)) == (None, list(files()))


def test_made_by_one_process_before_many_open_it(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", files())
    prepare_index(path)
    assert index_files(path)[0].is_file()
    (tmp_path / "b.zip").write_bytes(b"junk")
    for wrong in (tmp_path / "b.zip", tmp_path / "none.zip", tmp_path):
        prepare_index(wrong)        # No error: who opens it gets one.


def test_wrong_labels_are_an_error_only_for_who_uses_them(tmp_path, kept):
    path = write_zip(tmp_path / "a.zip", files(), {"labels": [["00000/img00000000.png", 0]]})
    for _ in range(2):
        dataset = ImageDataset(path)
        assert dataset.has_labels
        with pytest.raises(UserError, match="no label for 5 of 6 images"):
            ImageDataset(path, use_labels=True)


def test_pickled_without_the_list(tmp_path, kept):
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", files(200), metadata(200)))
    data = pickle.dumps(dataset)
    assert b"img00000150" not in data
    copy = pickle.loads(data)
    assert copy.file_name(150) == dataset.file_name(150)
    assert np.array_equal(copy[150][0], dataset[150][0])
    (tmp_path / "a.zip.index").unlink()
    assert pickle.loads(data).file_name(150) == dataset.file_name(150)
    write_zip(tmp_path / "a.zip", files(199))
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(data)
    copy.close()
    dataset.close()

#----------------------------------------------------------------------------
# Changes while it is in use.

def test_replaced_while_in_use(tmp_path):
    path = write_zip(tmp_path / "a.zip", files())
    dataset = ImageDataset(path)
    os.utime(write_zip(tmp_path / "b.zip", {**files(5), "00000/z.png": encoded(pixels(1))}), (1, 1))
    os.replace(tmp_path / "b.zip", path)
    with pytest.raises(UserError, match=r"a\.zip: changed while it was in use, .*start again"):
        dataset[0]


def test_overwritten_while_in_use(tmp_path):
    path = write_zip(tmp_path / "a.zip", files())
    dataset = ImageDataset(path)
    before = dataset[3][0]
    path.write_bytes(path.read_bytes()[:900])       # The same file, open in the data set.
    assert np.array_equal(before, pixels(3).transpose(2, 0, 1))
    with pytest.raises(UserError, match=r"a\.zip: changed while it was in use, from \d+ to 900 bytes"):
        dataset[5]
    dataset.close()


def test_one_descriptor_serves_threads_and_forks(tmp_path):
    store = ZipStore(write_zip(tmp_path / "a.zip", files(50)))
    store.read(0)
    want = [zlib.crc32(data) for data in files(50).values()]
    pid = os.fork()
    mine = [zlib.crc32(store.read(i)) for i in range(50) for _ in range(4)][::4]
    if pid == 0:
        os._exit(0 if mine == want else 1)
    assert mine == want
    assert os.waitpid(pid, 0)[1] == 0
    store.close()

#----------------------------------------------------------------------------
# Anything at all.

def sample_archive() -> bytes:
    """A bit of everything: stored, deflated, a comment, extra fields, labels."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(4):
            info = zipfile.ZipInfo(f"00000/img{i}.png")
            info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            info.extra = struct.pack("<HHL", 0x5455, 4, i)
            archive.writestr(info, encoded(pixels(i, 4)))
        archive.writestr("dataset.json", '{"labels": [["00000/img0.png", 0]], "classes": null}')
        archive.comment = b"comment"
    return buffer.getvalue()


SAMPLE = sample_archive()
DIRECTORY_AT = SAMPLE.index(b"PK\x01\x02")
INTERESTING = [b"\0", b"\xff", b"\xff\xff", b"\xff\xff\xff\xff", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07",
               b"PK\x06\x06", b"\x01\0\x10\0", b"../", b"\0\0\0\0"]
edits = strategies.lists(strategies.tuples(
    strategies.one_of(strategies.integers(0, len(SAMPLE)), strategies.integers(DIRECTORY_AT, len(SAMPLE))),
    strategies.one_of(strategies.binary(max_size=8), strategies.sampled_from(INTERESTING)),
    strategies.sampled_from(["overwrite", "insert", "delete", "cut"])), min_size=1, max_size=4)


def edited(data: bytes, changes) -> bytes:
    for at, value, kind in changes:
        if kind == "overwrite":
            data = data[:at] + value + data[at + len(value):]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(value) + 1:]
        else:
            data = data[:at]
    return data


FUZZ = {"deadline": None, "database": None, "derandomize": True,
        "suppress_health_check": list(hypothesis.HealthCheck)}


def read_or_refuse(path, data):
    """The archive gives the right contents or a documented error, and nothing else."""
    path.write_bytes(data)
    try:
        store = ZipStore(path)
    except UserError as err:
        if "\n" in str(err):
            raise
        return
    for i in range(len(store.names)):
        try:
            content = store.read(i)
        except OSError:
            continue
        assert (len(content), zlib.crc32(content)) == store.content_key(i)
    store.close()


@pytest.mark.slow
@hypothesis.settings(max_examples=500, **FUZZ)
@hypothesis.given(changes=edits)
def test_mutated_archives(tmp_path, changes):
    read_or_refuse(tmp_path / "a.zip", edited(SAMPLE, changes))


@pytest.mark.slow
@hypothesis.settings(max_examples=100, **FUZZ)
@hypothesis.given(seed=strategies.integers(0, 2 ** 32 - 1))
def test_ten_thousand_mutated_archives(tmp_path, seed):
    """Several at a time: drawing them one by one takes longer than reading them."""
    rng = np.random.RandomState(seed)
    for _ in range(100):
        changes = []
        for _ in range(rng.randint(1, 5)):
            at = rng.randint(rng.choice([0, DIRECTORY_AT, DIRECTORY_AT]), len(SAMPLE))
            value = rng.bytes(rng.randint(9)) if rng.randint(2) else INTERESTING[rng.randint(len(INTERESTING))]
            changes.append((at, value, rng.choice(["overwrite", "insert", "delete", "cut"], p=[0.7, 0.1, 0.1, 0.1])))
        read_or_refuse(tmp_path / "a.zip", edited(SAMPLE, changes))


@pytest.mark.parametrize("seed", range(3))
def test_what_zipfile_reads_is_read_the_same(tmp_path, seed):
    """Random archives, with zipfile as the judge."""
    rng = np.random.RandomState(seed)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40):
            info = zipfile.ZipInfo(f"{'ab/' * rng.randint(3)}{i}{chr(rng.randint(0xA1, 0x3000))}.png")
            info.compress_type = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][rng.randint(2)]
            info.comment = rng.bytes(rng.randint(50))
            with archive.open(info, "w", force_zip64=bool(rng.randint(2))) as file:
                file.write(rng.bytes(rng.randint(3000)) * rng.randint(3))
    assert_as_zipfile(path)
    shutil.copyfile(path, tmp_path / "b.zip")
    assert_as_zipfile(tmp_path / "b.zip")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    for size in (8, 64):
        with pytest.raises(OSError, match=r"pixels|pixels, more than the 50|exceeds"):
            raise_as_os_error(encoded(pixels(0, size)))
    path = write_zip(tmp_path / "a.zip", files())
    with pytest.raises(UserError, match=r"img00000000\.png: cannot be decoded \(.*exceeds limit|.*more than the 50"):
        ImageDataset(path)


def raise_as_os_error(data):
    """Pillow warns or raises a class of its own, by how much too large an image is."""
    import PIL.Image
    try:
        open_image(data)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as err:
        raise OSError(str(err)) from err
