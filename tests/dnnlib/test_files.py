# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole: which places they may have, and what errors call them."""
import errno
import os

import pytest

from dnnlib.util import atomic_file, atomic_folder, atomic_path


def fill(path, *names: str) -> None:
    with atomic_folder(path) as temp:
        for name in names:
            (temp / name).write_text(name)


def content(path) -> list[str]:
    return sorted(os.listdir(path))


def test_an_empty_folder_stays_the_same_one(tmp_path, monkeypatch):
    """It may be the place of a disk, a link or the current folder, none of which can be replaced."""
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    before = target.stat().st_ino
    fill(link, "a", "b")
    assert link.is_symlink()
    assert target.stat().st_ino == before
    assert content(target) == ["a", "b"]
    assert content(tmp_path) == ["link", "target"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(".", "c")
    assert content(".") == ["c"]


def test_what_is_in_the_place_of_a_folder_stays(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError) as info:
        fill(tmp_path / "file", "a")
    assert info.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    fill(tmp_path / "new", "a")
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "new", "b")
    assert content(tmp_path / "new") == ["a"]


def test_two_cannot_fill_one_folder(tmp_path):
    """In a folder that is there the second one is refused at once; a new one belongs to whoever ends first."""
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temp:
        with pytest.raises(OSError, match="not empty"):
            fill(tmp_path / "out", "b")
        (temp / "a").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "new"):
        fill(tmp_path / "new", "b")
    assert (content(tmp_path), content(tmp_path / "out"), content(tmp_path / "new")) == (["new", "out"], ["a"], ["b"])


@pytest.mark.parametrize("open_it", [atomic_file, atomic_path, atomic_folder])
def test_a_full_disk_is_told_of_the_path_that_was_asked_for(tmp_path, open_it):
    with pytest.raises(OSError, match="No space") as info, open_it(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left")
    assert info.value.filename == str(tmp_path / "x")
    if open_it is not atomic_file:
        with pytest.raises(OSError, match="No space") as info, open_it(tmp_path / "x") as temp:
            raise OSError(errno.ENOSPC, "No space left", str(temp / "inside"))
        assert info.value.filename == str(tmp_path / "x")
    assert content(tmp_path) == []
