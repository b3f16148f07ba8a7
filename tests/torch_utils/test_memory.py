# SPDX-License-Identifier: Apache-2.0
"""Memory of the machine and of the process, also where the system does not tell."""
import importlib
import os
import sys
import threading

import pytest

from data_prep import parallel
from dnnlib import util
from torch_utils import memory


def test_memory_is_what_the_system_says(tmp_path, monkeypatch):
    assert memory.peak_memory() > 1 << 20
    assert memory.free_memory() is None or memory.free_memory() > 0
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    3000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.free_memory() == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 77\n")
    assert memory.free_memory() == 3000 * 1024
    for limit, free in ((5000, 4000), (500, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory.free_memory() == free


@pytest.mark.parametrize(("module", "blocked"), [(memory, "resource"), (util, "fcntl")])
def test_modules_that_windows_lacks(module, blocked, monkeypatch, tmp_path):
    """As they are when these imports fail; afterwards as before."""
    names = dict(vars(module))
    monkeypatch.setitem(sys.modules, blocked, None)
    try:
        importlib.reload(module)
        if module is memory:
            monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
            monkeypatch.setattr(memory, "GROUP", tmp_path)
            assert (memory.peak_memory(), memory.free_memory()) == (None, None)
        else:
            with util.file_lock(tmp_path / "lock", 1):
                assert (tmp_path / "lock").is_file()
    finally:
        monkeypatch.undo()
        vars(module).update(names)


def test_reading_at_a_place_without_pread(tmp_path, monkeypatch):
    """Several threads read through one descriptor, each from its place."""
    (tmp_path / "x").write_bytes(bytes(range(256)) * 64)
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    monkeypatch.delattr(os, "pread")
    wrong = []

    def read(first: int) -> None:
        for i in range(200):
            offset = (first + 37 * i) % 16_000
            if util.read_at(fd, 5, offset) != bytes((offset + k) % 256 for k in range(5)):
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert not wrong


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert parallel.default_workers(10 ** 9) == os.cpu_count()
