"""Who owns a run folder, what it is called, and by what a command knows its run again: content, not paths."""
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from dnnlib import UserError
from dnnlib.util import file_sha256
from tests.conftest import write_dataset
from tests.training.run.test_resume import DESC, INFO, make_run, settings
from tests.training.test_loop import SMALL, only_run
from torch_utils import checkpoint
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from train import main
from training.config import to_dict
from training.data.inventory import compare, read_inventory, write_inventory
from training.dataset import ImageDataset
from training.run import lock
from training.run.folder import (
    DATA_FILE,
    FILES,
    OPTIONS_FILE,
    OPTIONS_KEY,
    RUN_INFO,
    STATE_FILE,
    Given,
    RunChoice,
    claim_run,
    create_run,
    find_run,
    read_options,
    run_description,
)
from training.run.formats import STATE_FORMAT
from training.run.lock import LOCK_FILE, Owner, RunLock, owner_of, this_process
from training.run.resume import check_state
from training.run.sources import Source, by_content, find_sources, keep_networks, with_kept_networks
from training.run.stages import FINISHED_FILE, is_finished

ROOT = Path(__file__).resolve().parents[3]
HOLD = "import sys, pathlib; from training.run.lock import RunLock; l = RunLock(pathlib.Path(sys.argv[1])); " \
       "print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A folder that another process holds, and that process; nobody waits long for it."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    folder = make_run(tmp_path, 0, settings(), state=None)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()

#----------------------------------------------------------------------------
# The lock.

def test_a_second_starter_gets_a_line_and_changes_nothing(held, tmp_path):
    folder, process = held
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on ") as error:
        find_run(tmp_path, DESC, settings(), Given(INFO))
    assert f"kill {process.pid}" in str(error.value)
    with pytest.raises(UserError, match="is in use by"):
        RunLock(folder)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    # Other settings are another run, and go beside it.
    assert find_run(tmp_path, DESC, settings(seed=1), Given(INFO)).folder.name.startswith("00001-")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert owner_of(folder) is None
    mine = RunLock(folder)              # The system has freed it.
    assert f"left by process {process.pid}" in mine.note
    mine.release()
    assert (folder / LOCK_FILE).read_bytes() == b""
    mine.release()
    again = RunLock(folder)
    assert again.note is None           # Left in order.
    again.release()


def test_a_run_that_only_begins_is_not_joined(held, tmp_path):
    folder, _ = held
    (folder / OPTIONS_FILE).unlink()    # The other process has not come to it yet.
    with pytest.raises(UserError, match="is in use by"):
        find_run(tmp_path, DESC, settings(), Given(INFO))


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    mine = RunLock(tmp_path)
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    mine.forget()                       # Without release, as when the owner is killed.
    assert owner_of(tmp_path) is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("locks_work", [True, None])
def test_owners_on_other_machines_are_known_by_their_beats(tmp_path, monkeypatch, locks_work):
    """Where a lock reaches one machine only, or files cannot be locked at all."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "try_lock", lambda fd, shared=False: locks_work)
    other, beats = Owner("elsewhere", 7, "2026-01-01 00:00:00"), iter(range(1, 100))

    def write(beats: int) -> None:
        (tmp_path / LOCK_FILE).write_text(json.dumps(vars(other) | {"beats": beats}))
    write(0)
    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", lambda seconds: write(next(beats)))
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            RunLock(tmp_path)
    mine = RunLock(tmp_path)            # It does not beat any more.
    assert "left by process 7 on elsewhere" in mine.note
    mine.release()


def test_what_was_chosen_is_still_so_when_it_is_taken(tmp_path):
    """Another process ends its run between the choice and the lock: its state counts."""
    folder, choices = tmp_path / f"00000-{DESC}", []

    def find():
        choices.append(find_run(tmp_path, DESC, settings(), Given(INFO)))
        if len(choices) == 1:
            make_run(tmp_path, 0, settings())
        return choices[-1]
    choice, mine = claim_run(find)
    assert (choice.folder, choice.resumed, len(choices)) == (folder, True, 2)
    assert owner_of(folder).pid == this_process().pid == os.getpid()
    mine.release()

#----------------------------------------------------------------------------
# Names.

@pytest.mark.parametrize(("desc", "message"), [
    ("lr/0.1", "has '/'.*--desc=lr_0.1 would do"), ("a\\b", "would do"), ("..", "--desc=mine would do"),
    ("a..b", "two dots.*--desc=a.b would do"), ("x\n", "has '\\\\n'"), ("a\x1b[31m", "has '\\\\x1b'"),
    (" a", "a space"),    ("a\u202eb", "would do"), ("n" * 200, "too long .*: leave out"), ("\xe9" * 100, "too long"),
])
def test_descriptions_that_are_no_names_are_refused(desc, message):
    with pytest.raises(UserError, match=message):
        run_description(["stylegan3-t", "blobs16", "gpus8", "batch16"], desc)


def test_names_in_two_spellings_are_one_name(tmp_path):
    parts = ["stylegan3-t", "blobs16", "gpus8", "batch16"]
    assert run_description(parts, "e\u0301") == run_description(parts, "\xe9")
    folder = make_run(tmp_path, 0, settings(), desc=DESC + "-e\u0301")
    assert find_run(tmp_path, run_description(parts, "\xe9"), settings(), Given(INFO)).folder == folder

@pytest.mark.slow
def test_a_lock_file_that_was_deleted_is_made_anew(tmp_path):
    mine = RunLock(tmp_path)
    (tmp_path / LOCK_FILE).unlink()
    mine._hold_again()
    mine._hold_again()
    with pytest.raises(UserError, match="is in use by"):
        RunLock(tmp_path)
    mine.release()
    RunLock(tmp_path).release()

#----------------------------------------------------------------------------
# Damaged settings.

@pytest.mark.parametrize("content", [
    "", "{", "[]", None, "{}", '{"data": {}, "generator": null}', '{"data": {}, "generator": {}, "run": 5}',
    '{"data": {}, "generator": {}, "run": {"class_names": 5}}', '{"data": {}, "generator": {}, "run": {"starts": "x"}}',
    '{"data": {}, "generator": {}, "run": {"files": [1]}}', pytest.param("[" * 20_000, id="deep")])
def test_damaged_settings_are_those_of_the_state(tmp_path, content):
    folder = make_run(tmp_path, 0, settings())
    checkpoint.save(folder / STATE_FILE, {"format": STATE_FORMAT, OPTIONS_KEY: read_options(folder)})
    if content is None:
        (folder / OPTIONS_FILE).unlink()
    else:
        (folder / OPTIONS_FILE).write_text(content)
    choice = find_run(tmp_path, DESC, settings(), Given(INFO))
    assert (choice.folder, choice.resumed) == (folder, True)
    assert "is missing or damaged" in choice.notes[0]
    assert not find_run(tmp_path, DESC, settings(seed=1), Given(INFO)).resumed
    checkpoint.save(folder / STATE_FILE, {"format": STATE_FORMAT})
    with pytest.raises(UserError, match="missing or damaged.*does not tell the settings"):
        find_run(tmp_path, DESC, settings(), Given(INFO))


def test_a_state_of_other_settings_is_refused_when_it_is_loaded(tmp_path):
    networks = {"net": {"name": "net", "source": "", "sha256": "a" * 64}}
    state = {OPTIONS_KEY: json.loads(json.dumps(to_dict(settings()))), "backbones": networks}
    check_state(state, tmp_path, settings(batch=32, total_kimg=1), networks)
    with pytest.raises(UserError, match="training-state.pt.*seed: 0 -> 1"):
        check_state(state, tmp_path, settings(seed=1), networks)
    with pytest.raises(UserError, match="sha256 of net"):
        check_state(state, tmp_path, settings(), {"net": networks["net"] | {"sha256": "b" * 64}})
    with pytest.raises(UserError, match="backbones"):
        check_state(state, tmp_path, settings(), {"other": networks["net"]})

#----------------------------------------------------------------------------
# Files by content.

def test_files_are_compared_by_content(tmp_path):
    stem = tmp_path / "stem.pkl"
    stem.write_bytes(b"weights")
    old = {"path_stem": str(stem), "x": 1}
    record = Source(str(stem), stem).record()
    assert record["sha256"] == file_sha256(stem)

    def compared(typed: str, file: Path | None):
        before, after, moved = by_content(old, {"path_stem": typed, "x": 1}, {"path_stem": record},
                                          {"path_stem": Source(typed, file)})
        return before == after, [name for name, _, _ in moved]
    assert compared(str(stem), stem) == (True, [])
    moved = tmp_path / "moved.pkl"
    shutil.move(stem, moved)
    assert compared(str(moved), moved) == (True, ["path_stem"])
    assert compared(str(stem), None) == (True, [])                  # Deleted: the name decides.
    assert compared("other.pkl", None) == (False, [])
    stem.write_bytes(b"others!")
    assert compared(str(stem), stem) == (False, [])                 # The same name and size.


def test_networks_in_use_are_kept(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"network")
    config = settings()
    config = settings(discriminator=type(config.discriminator)(backbones=("local:random", f"local:{path}")))
    sources = find_sources(config, Path)
    assert list(sources) == ["discriminator.backbones.1"]
    records = {name: source.record() for name, source in sources.items()}
    keep_networks(tmp_path / "run", records)
    assert with_kept_networks(config, tmp_path / "run", records, sources) == config
    path.unlink()
    _, kept = with_kept_networks(config, tmp_path / "run", records, find_sources(config, Path)).discriminator.backbones
    assert Path(kept).read_bytes() == b"network"
    assert Path(kept).name == "net.safetensors"                     # D's tensors are called after it.

#----------------------------------------------------------------------------
# Data by content.

def as_folder(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as z:
        z.extractall(folder)
    return folder


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_data_that_grew_or_were_repaired(tmp_path, kind):
    """A folder that was begun with; now other files, there or in an archive."""
    a = write_dataset(tmp_path / "a.zip", 16)
    folder = as_folder(a, tmp_path / "a")
    before = ImageDataset(folder if kind == "folder" else a, use_labels=True)
    write_inventory(tmp_path / DATA_FILE, before.inventory())
    old = read_inventory(tmp_path / DATA_FILE)
    assert compare(old, ImageDataset(folder, use_labels=True).inventory()) == ("", True)
    assert compare(old, ImageDataset(a, use_labels=True).inventory()) == ("", True)
    others = ImageDataset(write_dataset(tmp_path / "b.zip", 16, seed=1), use_labels=True)
    assert compare(old, others.inventory())[1] is False
    file = folder / "00000/img00000003.png"
    file.write_bytes((folder / "00000/img00000007.png").read_bytes())
    text, is_related = compare(old, ImageDataset(folder, use_labels=True).inventory())
    assert (text, is_related) == ("1 changed (00000/img00000003.png)", True)
    grown = ImageDataset(write_dataset(tmp_path / "c.zip", 16, num_images=18), use_labels=True)
    text, is_related = compare(old, grown.inventory())
    assert text == "16 -> 18 images; 2 new (00000/img00000016.png, 00000/img00000017.png)"
    assert is_related


def test_changed_data_need_a_word(tmp_path):
    data = [ImageDataset(write_dataset(tmp_path / f"{n}.zip", 16, num_images=n), use_labels=True) for n in (16, 18)]
    given = [Given(INFO | {"data_fingerprint": d.fingerprint}, {}, d.inventory) for d in data]
    folder = tmp_path / "runs" / f"00000-{DESC}"
    create_run(RunChoice(folder, False), settings(), given[0])
    (folder / STATE_FILE).touch()
    choice = find_run(tmp_path / "runs", DESC, settings(), given[1])
    assert not choice.resumed
    assert "data: 16 -> 18 images; 2 new" in "\n".join(choice.notes)
    assert "--continue-changed" in choice.notes[-1]
    choice = find_run(tmp_path / "runs", DESC, settings(), given[1], continue_changed=True)
    assert choice.resumed
    assert "data: 16 -> 18 images" in "\n".join(choice.notes)
    create_run(choice, settings(), given[1])
    assert len(read_inventory(folder / DATA_FILE)["files"]) == 18

#----------------------------------------------------------------------------
# The command.

def run(outdir: Path, data: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*SMALL, f"--outdir={outdir}", f"--data={data}", *more])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


@pytest.mark.slow
def test_a_run_goes_on_without_the_files_that_it_began_with(tmp_path, data16):
    """Start, feature network and data lie elsewhere or are gone; and it is not joined while somebody has it."""
    assert run(tmp_path / "first", data16, "--kimg=0.008")[0] == 0
    start, network = tmp_path / "start.pkl", tmp_path / "net.safetensors"
    shutil.copy(only_run(tmp_path / "first") / "best_model.pkl", start)
    save_own_network(network, OwnNetwork(own_config(num_classes=4, widths=(8, 8))))
    data = shutil.copy(data16, tmp_path / "blobs.zip")
    options = (f"--init-from={start}", f"--backbones={network}")
    code, output = run(tmp_path / "runs", data, "--kimg=0.008", *options)
    assert code == 0, output
    for path in (start, network, data):
        os.rename(path, tmp_path / f"moved_{os.path.basename(path)}")
    code, output = run(tmp_path / "runs", tmp_path / "moved_blobs.zip", "--kimg=0.016", *options)
    assert code == 0, output
    assert "resuming at kimg 0.0" in output
    moved = tuple(o.replace(str(tmp_path) + "/", f"{tmp_path}/moved_") for o in options)
    code, output = run(tmp_path / "runs", tmp_path / "moved_blobs.zip", "--kimg=0.024", *moved)
    assert code == 0, output
    folder = only_run(tmp_path / "runs")
    assert checkpoint.load(folder / STATE_FILE, STATE_FORMAT)["counters"]["cur_nimg"] == 24
    assert set(read_options(folder)[RUN_INFO][FILES]) == {"init_from", "discriminator.backbones.0"}
    (folder / OPTIONS_FILE).write_text("{")
    mine = RunLock(folder)
    code, output = run(tmp_path / "runs", tmp_path / "moved_blobs.zip", "--kimg=0.032", *moved)
    mine.release()
    assert code == 2
    assert output.count("\n") == 1
    assert f"is in use by process {os.getpid()} on" in output
    code, output = run(tmp_path / "runs", tmp_path / "moved_blobs.zip", "--kimg=0.032", *moved)
    assert code == 0, output
    assert "training_options.json is missing or damaged" in output


def test_files_that_lie_too_deep_count_as_damaged(tmp_path):
    """JSON nested deeper than the parser goes is no reason for a traceback."""
    (tmp_path / OPTIONS_FILE).write_text("[" * 100_000)
    (tmp_path / FINISHED_FILE).write_text('{"kimg":' * 100_000)
    assert read_options(tmp_path) is None
    assert not is_finished(tmp_path, 1)
