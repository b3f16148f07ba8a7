"""Small data sets that many tests share, a machine without downloads, and reports of closeness and of skipped tests."""
import collections
import dataclasses
import json
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests import closeness
from torch_utils import published
from training.watch import reporting
from training.watch.html_report import REPORT_FILE, write_report

# Files that take minutes: begun last, they would have one process work alone at the end.
LONG_FILES = ("test_demo.py", "test_nodes.py", "test_resume.py", "test_processes.py")


def pytest_addoption(parser):
    parser.addoption("--closeness", metavar="FILE", default=None,
                     help="write a JSON list of all tests: outcome, time, and the comparison closest to its bound")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_configure(config):
    """Native operations are compiled once, not by every test that starts a script. Signals that the shell has this
    program ignore, as it does in the background and under nohup, end it as usual: tests send them, and so do the
    programs that they start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if "STYLESAN_OPS_CACHE" not in os.environ and getattr(config, "cache", None) is not None:
        os.environ["STYLESAN_OPS_CACHE"] = str(config.cache.mkdir("ops"))
    # The processes of pytest-xdist send their reports to the one that started them, which alone writes the file.
    if config.getoption("closeness") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ClosenessReport(Path(config.getoption("closeness"))), "closeness-report")


def pytest_sessionstart(session):
    from torch_utils.ops import dispatch
    dispatch.load("cpu")
    # Ten figures would take longer than the rest of a tiny run.
    reporting.write_report = lambda folder: folder / REPORT_FILE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The comparison closest to its bound goes with the report of the test. A fixture would end after that report."""
    closeness.start_recording()
    try:
        return (yield)
    finally:
        worst = closeness.worst_comparison()
        if worst is not None:
            item.user_properties.append(("closeness", {"share": worst.share, **dataclasses.asdict(worst)}))


class ClosenessReport:
    """The file of `--closeness`: one entry per test."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}

    def pytest_runtest_logreport(self, report):
        entry = self.entries.get(report.nodeid)
        if report.when == "call" or (entry is None and not report.passed):
            found = dict(report.user_properties).get("closeness", {})
            self.entries[report.nodeid] = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration,
                                           **{key: found.get(key) for key in ("share", "error", "bound", "place")}}
        elif entry is not None and report.failed:       # While it was taken down.
            entry["outcome"] = "failed"

    def pytest_sessionfinish(self):
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(list(self.entries.values()), indent=1) + "\n")
        os.replace(part, self.path)


def pytest_terminal_summary(terminalreporter):
    """How many tests were skipped, and why: a test that never runs anywhere shows nothing."""
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ")
                                  for report in terminalreporter.stats.get("skipped", []))
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")
    if not reasons:
        terminalreporter.write_line("no test was skipped")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """Nothing is downloaded, and nothing outside the test's folders is written."""
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def reports(monkeypatch):
    """Runs within the test's process draw report.html, as they do outside tests."""
    monkeypatch.setattr(reporting, "write_report", write_report)


@pytest.fixture
def _no_packages(monkeypatch):
    """The packages with weights are not installed."""
    for name, package in published.PACKAGES.items():
        monkeypatch.setitem(published.PACKAGES, name, package._replace(module="package_that_is_not_installed"))


def write_dataset(path, resolution: int, num_images: int = 16, num_classes: int = 4, seed: int = 0,
                  classes: list[str] | None = None):
    """A data set zip of smooth coloured blobs whose colour tells the class; `num_classes` 0: no labels."""
    rng = np.random.RandomState(seed)
    labels = []
    y, x = np.mgrid[:resolution, :resolution] / resolution
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(num_images):
            label = i % num_classes if num_classes else 0
            centre, colour = rng.rand(2), np.random.RandomState(label).rand(3)
            blob = np.exp(-8 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2))[:, :, None]
            image = (255 * blob * colour).astype(np.uint8)
            name = f"00000/img{i:08d}.png"
            with archive.open(name, "w") as f:
                PIL.Image.fromarray(image).save(f, format="PNG")
            labels.append([name, label])
        if num_classes:
            archive.writestr("dataset.json", json.dumps({"labels": labels, "classes": classes}
                                                        if classes else {"labels": labels}))
    return path


@pytest.fixture(scope="session")
def data16(tmp_path_factory):
    """16 labelled images of 16 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "blobs16.zip", 16)


@pytest.fixture(scope="session")
def data32(tmp_path_factory):
    """16 labelled images of 32 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "blobs32.zip", 32)
