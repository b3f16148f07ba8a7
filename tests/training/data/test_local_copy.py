# SPDX-License-Identifier: Apache-2.0
"""Copies of archives on a local disk."""
import dataclasses
import os

import pytest
from click.testing import CliRunner

import train
from dnnlib import UserError
from legacy import open_snapshot
from tests.data_prep.samples import files, metadata, write_folder, write_zip
from training.data import local_copy, zip_index
from training.data.local_copy import copy_to_local_disk
from training.dataset import ImageDataset
from training.run.options import TrainOptions
from training.run.plan import plan_run, with_local_data


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "net").mkdir()
    return write_zip(tmp_path / "net" / "set.zip", files(), metadata())


def test_copied_once_and_used_again(archive, tmp_path):
    said = []
    copy = copy_to_local_disk(archive, tmp_path / "fast" / "disk", said.append)
    assert copy.read_bytes() == archive.read_bytes()
    assert copy.name == "set.zip"       # The name of a data set is part of the name of a run.
    inode = copy.stat().st_ino
    assert copy_to_local_disk(archive, tmp_path / "fast" / "disk", said.append) == copy
    assert copy.stat().st_ino == inode
    assert len(said) == 1
    assert "copying" in said[0]
    assert {p.name for p in copy.parent.iterdir()} == {"set.zip", "set.zip.sha256"}
    one, two = (ImageDataset(path, use_labels=True) for path in (archive, copy))
    assert (one.fingerprint, one.name) == (two.fingerprint, two.name)
    two.close()


def test_a_changed_archive_gets_a_new_copy(archive, tmp_path):
    first = copy_to_local_disk(archive, tmp_path / "fast")
    write_zip(archive, files(7), metadata(7))
    second = copy_to_local_disk(archive, tmp_path / "fast")
    assert first != second
    assert second.read_bytes() == archive.read_bytes()


def test_a_damaged_or_unfinished_copy_is_made_again(archive, tmp_path):
    copy = copy_to_local_disk(archive, tmp_path / "fast")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-100])
    assert copy_to_local_disk(archive, tmp_path / "fast").read_bytes() == whole
    copy.write_bytes(whole)             # Another time: perhaps another content.
    assert copy_to_local_disk(archive, tmp_path / "fast").stat().st_mtime_ns == archive.stat().st_mtime_ns
    copy.with_name("set.zip.sha256").unlink()
    said = []
    copy_to_local_disk(archive, tmp_path / "fast", said.append)
    assert len(said) == 1


def test_the_index_comes_along(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(zip_index, "MIN_ENTRIES", 1)
    ImageDataset(archive).close()
    copy = copy_to_local_disk(archive, tmp_path / "fast")
    monkeypatch.setattr(zip_index, "make_index", lambda path: pytest.fail("listed again"))
    ImageDataset(copy).close()


def test_a_copy_that_differs(archive, tmp_path, monkeypatch):
    class Worn:
        def hexdigest(self):
            return "0" * 64
    monkeypatch.setattr(local_copy.hashlib, "file_digest", lambda *args: Worn())
    with pytest.raises(UserError, match="the copy of .* differs from it: check the disk"):
        copy_to_local_disk(archive, tmp_path / "fast")
    assert not list((tmp_path / "fast").rglob("set.zip*"))


def test_changed_while_it_is_copied(archive, tmp_path):
    with pytest.raises(UserError, match="changed while it was copied"):
        copy_to_local_disk(archive, tmp_path / "fast", lambda text: os.utime(archive))
    assert not list((tmp_path / "fast").rglob("set.zip*"))


def test_no_room(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=r"--stage-to=.*fast: 100 B free, but set\.zip needs .*: make room"):
        copy_to_local_disk(archive, tmp_path / "fast")


def test_the_disk_fills_up_meanwhile(archive, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(local_copy, "atomic_file", full)
    with pytest.raises(UserError, match=r"free, but set\.zip needs .*: make room"):
        copy_to_local_disk(archive, tmp_path / "fast")


def test_what_cannot_be_copied(archive, tmp_path):
    folder = write_folder(tmp_path / "folder", files())
    with pytest.raises(UserError, match="copies zip archives, and .*folder is none"):
        copy_to_local_disk(folder, tmp_path / "fast")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--stage-to=.*file: .* cannot be copied there"):
        copy_to_local_disk(archive, tmp_path / "file")

#----------------------------------------------------------------------------
# The option of train.py.

def test_option(archive, tmp_path):
    dataset = ImageDataset(archive, use_labels=True, xflip=True)
    options = TrainOptions("runs", str(archive), cfg="stylegan3-t", preset="demo", cond=True, mirror=True)
    plan = plan_run(dataclasses.replace(options, stage_to=str(tmp_path / "fast")), 1, open_snapshot)
    staged = with_local_data(plan).dataset
    assert str(tmp_path / "fast") in staged.path
    assert (staged.fingerprint, staged.name, staged.c_dim, len(staged)) == (dataset.fingerprint, "set", 3, 12)
    plan = plan_run(options, 1, open_snapshot)
    assert with_local_data(plan) is plan
    staged.close()
    dataset.close()


def test_a_dry_run_copies_nothing(archive, tmp_path):
    result = CliRunner().invoke(train.main, [
        f"--outdir={tmp_path}/runs", "--cfg=stylegan3-t", "--preset=demo", "--batch=4", f"--data={archive}", "-n",
        "--device=cpu", f"--stage-to={tmp_path}/fast"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "fast").exists()
    assert "has class labels but --cond is off: training without classes" in result.output
