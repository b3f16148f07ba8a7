"""report.html: what is in it, that it stands alone, and that nothing about it can stop a run."""
import base64
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import training.watch.html_report
from training.watch.html_report import (
    MAX_POINTS,
    MAX_SHEETS,
    figures,
    main,
    pick,
    read_lines,
    read_run,
    settings,
    thinned,
    write_report,
)

HEADS = ["Loss/signs/real/net/0", "Loss/signs/real/net/1", "Loss/signs/fake/net/0", "Loss/signs/fake/net/1"]


def stat(mean: float) -> dict:
    return {"num": 8, "mean": mean, "std": 0.1}


@pytest.fixture
def folder(tmp_path):
    """A run of ten ticks, four snapshots and one metric, whose name needs escaping."""
    folder = tmp_path / "00000-a<b>"
    folder.mkdir()
    options = {"total_kimg": 10.0, "metrics": ["fid"], "generator": {"layers": [{"name": "L0"}, {"name": "L1"}]},
               "data": {"path": "blobs.zip"}, "resume": None, "optim": {"G_lr": 0.0025}}
    (folder / "training_options.json").write_text(json.dumps(options))
    with open(folder / "stats.jsonl", "w") as f:
        for tick in range(1, 11):
            line = {"cur_nimg": 1000 * tick, "run_start": 1, "Progress/elapsed": 60.0 * tick,
                    "Progress/sec_per_kimg": 60.0, "Progress/img_per_sec": 16.7, "Progress/eta_sec": 600.0 - 60 * tick,
                    "Progress/diversity": 0.1 * tick, "Progress/data_wait": 0.01, "Progress/maintenance_share": 0.1}
            line |= {name: stat(0.1) for name in ["Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/signs/fake"]}
            f.write(json.dumps(line | {name: stat(0.2) for name in HEADS}) + "\n")
    with open(folder / "metric-fid.jsonl", "w") as f:
        for kimg, value in ((0, 300.0), (5, 20.0), (10, 4.5)):
            line = {"metric": "fid", "results": {"fid": value}, "cur_nimg": kimg * 1000,
                    "snapshot_pkl": f"network-snapshot-{kimg:06d}.pkl"}
            f.write(json.dumps(line) + "\n")
    for name in ("reals", "fakes000000", "fakes000002.500", "fakes000005", "fakes000010"):
        shade = np.full([40, 60, 3], 100, dtype=np.uint8)
        PIL.Image.fromarray(shade).save(folder / f"{name}.png")
    return folder


def pictures(text: str) -> list[PIL.Image.Image]:
    return [PIL.Image.open(io.BytesIO(base64.b64decode(data)))
            for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


@pytest.mark.slow
def test_report_stands_alone_and_is_complete(folder):
    text = write_report(folder).read_text()
    assert text.isascii()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/png") for source in sources)
    for outside in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert outside not in text
    assert len(pictures(text)) == 1 + 5 + 5         # Metric; panels with numbers; sheets.
    for said in ("00000-a&lt;b&gt;", "10 of 10 kimg", "generated, 2.5 kimg", "optim.G_lr", "0.0025", "L0, L1",
                 "4.5 (kimg 10)", "No verdicts", "Sign rates", "Diversity"):
        assert said in text, said
    assert "<b>" not in text
    for picture in pictures(text):
        assert min(picture.size) > 100              # Small sheets are enlarged.
        assert np.asarray(picture.convert("L")).std() > 0 or picture.size == (480, 320)      # A sheet of one colour.


def test_every_curve_is_drawn(folder):
    """The signs panel has a thin line per scale; panels without a number are left out."""
    drawn = {panel.title: panel for panel, _ in figures(read_run(folder))}
    assert set(drawn) == {"fid", "Losses", "Sign rates of D", "Diversity", "Speed", "Not training"}
    assert {c.name for c in drawn["Sign rates of D"].curves if c.thin} == set(HEADS)
    assert drawn["fid"].log                         # From 300 to 4.5.


def test_report_of_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "training_options.json").write_text('{"data": {}, "generator": {}}')
    text = write_report(tmp_path).read_text()
    assert "No ticks yet" in text
    assert not pictures(text)


def test_who_made_the_images_is_said(tmp_path):
    options = {"data": {}, "generator": {}, "run": {"credit": "By <Ada>, CC BY-SA 4.0"}}
    (tmp_path / "training_options.json").write_text(json.dumps(options))
    assert "<td>images</td><td>By &lt;Ada&gt;, CC BY-SA 4.0</td>" in write_report(tmp_path).read_text()


def test_verdicts_and_dumps_are_shown(folder):
    (folder / "health.jsonl").write_text(json.dumps({"cur_nimg": 3000, "verdict": "collapse", "is_bad": True,
                                                     "text": "1 < 2"}) + "\n")
    (folder / "nonfinite-000007.json").write_text('{"data": {}, "generator": {}}')
    text = write_report(folder).read_text()
    assert "kimg 3: collapse: 1 &lt; 2" in text
    assert "nonfinite-000007.json" in text
    assert "No verdicts" not in text


def test_lines_that_a_later_start_wrote_again_do_not_count(tmp_path):
    path = tmp_path / "stats.jsonl"
    lines = [(1, 8), (1, 16), (1, 24), (2, 16), (2, 24), (3, 32)]
    text = "\n".join(json.dumps({"run_start": start, "cur_nimg": nimg}) for start, nimg in lines)
    path.write_text(text + '\n{"cur_nimg": 4')      # Killed while writing.
    assert [(line["run_start"], line["cur_nimg"]) for line in read_lines(path)] == [(1, 8), (2, 16), (2, 24), (3, 32)]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_long_curves_and_many_sheets_are_thinned():
    x, y = thinned(np.arange(5000.0), np.arange(5000.0) * 2)
    assert len(x) == MAX_POINTS
    assert np.allclose(y, 2 * x)
    picked = pick(list(range(100)), MAX_SHEETS)
    assert len(picked) == MAX_SHEETS
    assert (picked[0], picked[-1]) == (0, 99)
    assert pick([1, 2], MAX_SHEETS) == [1, 2]


def test_settings_are_flat():
    assert settings({"a": {"b": None, "c": [1, 2]}, "d": 0.5, "e": []}) == [
        ("a.b", "none"), ("a.c", "1, 2"), ("d", "0.5"), ("e", "none")]


def test_command(folder, tmp_path):
    result = CliRunner().invoke(main, [str(folder)])
    assert result.exit_code == 0
    assert (folder / "report.html").is_file()
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 2
    assert "training_options.json" in result.output


def test_a_failed_report_leaves_the_old_one(folder, monkeypatch):
    before = write_report(folder).read_text()
    monkeypatch.setattr(training.watch.html_report, "figures", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(folder)
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob(".*.tmp"))
