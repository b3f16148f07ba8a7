# SPDX-License-Identifier: Apache-2.0
"""The command: every kind of input, files it writes, and one clear line with exit code 2 for every mistake."""
import dataclasses
import json
import os
import subprocess
import sys
import types
import unicodedata
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch

import calc_metrics
from dnnlib import UserError
from metrics.protocols import METRICS
from tests.closeness import approx
from tests.metrics.helpers import json_lines, random_images, write_folder
from torch_utils import checkpoint

ROOT = Path(__file__).resolve().parents[2]
NUM = 40


def call(*args):
    return click.testing.CliRunner().invoke(calc_metrics.main, [str(arg) for arg in args])


def run(*args):
    """Result lines of a call that must succeed."""
    result = call("--device=cpu", "--verbose=0", *args)
    assert result.exit_code == 0, result.stderr
    return json_lines(result.stdout)


def refused(match, *args):
    result = call("--device=cpu", "--verbose=0", *args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("Warning", "Reading", "ops:"))]
    assert len(lines) == 1, result.stderr
    assert match in lines[0]


@pytest.fixture
def data(tmp_path):
    """The same 40 generated images as folder, npz and class folders; 60 real ones as folder and zip."""
    gen, real = random_images(NUM, 16, seed=1, shift=20), random_images(60, 16, seed=2)
    write_folder(tmp_path / "gen", gen)
    write_folder(tmp_path / "classes", gen, [f"{i % 3}" for i in range(NUM)])
    np.savez(tmp_path / "gen.npz", np.ascontiguousarray(gen.transpose(0, 2, 3, 1)), np.arange(NUM) % 3)
    write_folder(tmp_path / "real", real)
    labels = {"labels": [[f"{i:06d}.png", i % 3] for i in range(60)]}
    (tmp_path / "real" / "dataset.json").write_text(json.dumps(labels))
    return tmp_path


TINY = ("--detector=tiny", f"--num={NUM}")

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestImages:
    def test_kinds_agree(self, data):
        want = ("--metrics=fid,kid,pr,is", f"--data={data}/real", *TINY)
        folder, npz = (run(f"--images={data}/{name}", *want) for name in ("gen", "gen.npz"))
        assert [record["results"] for record in folder] == [record["results"] for record in npz]
        assert [record["metric"] for record in folder] == ["fid", "kid", "pr", "is"]
        assert folder[0]["num_gen"] == NUM
        assert folder[0]["num_real"] == 60
        assert npz[0]["generated"]["kind"] == "samples"

    def test_table_goes_to_stderr(self, data):
        result = call("--device=cpu", f"--images={data}/gen", f"--ref={data}/real", "--metrics=fid", *TINY)
        assert all(line.startswith("{") for line in result.stdout.splitlines())
        assert "metric  value" in result.stderr
        assert "generated images: 100%" in result.stderr

    @pytest.mark.parametrize("batch", [1, 3])
    def test_batch_does_not_show(self, data, batch):
        want = (f"--images={data}/gen.npz", f"--ref={data}/real", "--metrics=fid,kid,pr,is", "--no-cache", *TINY)
        assert [r["results"] for r in run(*want)] == [r["results"] for r in run(f"--batch={batch}", *want)]

    def test_accuracy(self, data, tmp_path):
        from torch_utils.own_network import OwnNetwork, own_config, save_own_network
        torch.manual_seed(0)
        save_own_network(tmp_path / "judge.safetensors", OwnNetwork(own_config(3, 16, (8, 12))))
        want = ("--metrics=accuracy", f"--detector={tmp_path}/judge.safetensors", f"--num={NUM}")
        folder, npz = (run(f"--images={data}/{name}", *want)[0] for name in ("classes", "gen.npz"))
        assert folder["results"] == npz["results"]
        assert 0 <= folder["results"]["accuracy"] <= 1
        assert folder["reference"] is None
        refused("the images have no labels", f"--images={data}/gen", *want)

    def test_seeded_subset(self, data):
        want = (f"--images={data}/gen", f"--ref={data}/real", "--metrics=fid", "--detector=tiny", "--num=20")
        first, again, other = (run(*want, f"--seed={seed}")[0] for seed in (0, 0, 1))
        assert first["results"] == again["results"] != other["results"]
        assert first["generated"]["subset_of"] == NUM

    def test_results_folder(self, data, tmp_path):
        for _run in range(2):
            printed = run(f"--images={data}/gen", f"--ref={data}/real", "--metrics=fid", f"--out={tmp_path}/out", *TINY)
        lines = json_lines((tmp_path / "out" / "metric-fid.jsonl").read_text())
        assert len(lines) == 2
        assert lines[1] == printed[0]

    def test_jpeg_is_warned_of(self, data):
        import PIL.Image
        PIL.Image.open(data / "gen" / "000000.png").save(data / "gen" / "x.jpg")
        result = call("--device=cpu", f"--images={data}/gen", f"--ref={data}/real", "--metrics=fid", *TINY)
        assert "Warning" in result.stderr
        assert "JPEG" in result.stderr

#----------------------------------------------------------------------------

class TestClasses:
    """Images that lie where the judge sees them score one, whatever there is and whatever the order of names."""

    NAMES = ["zebra", "cat", "ant", "2", "owl", "caf\u00e9", "x", "y", "a b", "v", "w", "u"]

    def judge(self, path, names=None):
        from torch_utils.own_network import OwnNetwork, own_config, save_own_network
        torch.manual_seed(0)
        net = OwnNetwork(own_config(12, 16, (8, 12), names)).eval()
        save_own_network(path / "judge.safetensors", net)
        images = random_images(NUM, 16, seed=1, shift=20)
        seen = net.logits(net.prepare(torch.from_numpy(images))).argmax(dim=1).numpy()
        assert 1 < len(set(seen)) < 12
        return images, seen, ("--metrics=accuracy", f"--detector={path}/judge.safetensors", f"--num={NUM}")

    @pytest.mark.parametrize("form", ["{}", "{:02d}", "{}.0"])
    def test_folders_that_are_numbers(self, tmp_path, form):
        images, seen, want = self.judge(tmp_path)
        write_folder(tmp_path / "out", images, [form.format(i) for i in seen])
        assert run(f"--images={tmp_path}/out", *want)[0]["results"] == {"accuracy": 1}

    @pytest.mark.parametrize("unicode", ["NFC", "NFD"])
    def test_folders_that_are_names(self, tmp_path, unicode):
        images, seen, want = self.judge(tmp_path, self.NAMES)
        write_folder(tmp_path / "out", images, [unicodedata.normalize(unicode, self.NAMES[i]) for i in seen])
        assert run(f"--images={tmp_path}/out", *want)[0]["results"] == {"accuracy": 1}

    def test_numbers_for_a_judge_with_names(self, tmp_path):
        names = [name for name in self.NAMES if name != "2"] + ["z"]
        images, seen, want = self.judge(tmp_path, names)
        write_folder(tmp_path / "out", images, [str(i) for i in seen])
        result = call("--device=cpu", "--verbose=0", f"--images={tmp_path}/out", *want)
        assert json_lines(result.stdout)[0]["results"] == {"accuracy": 1}
        assert f"{seen.min()} is {names[seen.min()]}" in result.stderr

    def test_what_does_not_match(self, tmp_path):
        images, seen, want = self.judge(tmp_path)
        write_folder(tmp_path / "out", images, ["three" if i % 2 else "seven" for i in seen])
        refused("out: has the classes seven, three, but the judge --detector=local:judge.safetensors has 0, 1, 2, 3, "
                "4, 5, 6, 7, 8, 9 and 2 more, and none called seven, three", f"--images={tmp_path}/out", *want)
        np.savez(tmp_path / "out.npz", np.ascontiguousarray(images.transpose(0, 2, 3, 1)), seen + 20)
        refused("and none called 2", f"--images={tmp_path}/out.npz", *want)

    def test_labels_in_npz(self, tmp_path):
        images, seen, want = self.judge(tmp_path)
        pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        for labels in (seen.astype(np.uint8), seen[:, None], seen.astype(np.float32), np.eye(12)[seen],
                       np.eye(12, dtype=bool)[seen], seen.astype(str), seen.astype(bytes)):
            np.savez(tmp_path / "out.npz", pixels, labels)
            assert run(f"--images={tmp_path}/out.npz", *want)[0]["results"] == {"accuracy": 1}
        np.savez(tmp_path / "out.npz", pixels, labels=seen)
        assert run(f"--images={tmp_path}/out.npz", *want)[0]["results"] == {"accuracy": 1}
        for labels, match in ((seen + 0.5, "out.npz: arr_1 is float64 [40]: 40 labels are no class: "),
                              (np.full(NUM, np.nan), "40 labels are no class: nan"),
                              (seen[:-1], f"arr_1 is int64 [39], but labels of {NUM} images must be whole numbers"),
                              (np.ones([NUM, 3]), "arr_1 is float64 [40, 3], but 40 of its rows are not one-hot"),
                              (np.eye(3)[[0] * NUM] / 2, "are not one-hot: 0, 1, 2, 3, 4 and 35 more"),
                              (np.array([{}] * NUM), "arr_1 is an array of objects"), (-seen - 1, "are no class")):
            np.savez(tmp_path / "out.npz", pixels, labels)
            refused(match, f"--images={tmp_path}/out.npz", *want)
            run(f"--images={tmp_path}/out.npz", "--metrics=is", *TINY)          # Where nobody needs labels.

    @pytest.mark.parametrize(("names", "folders", "expected"), [
        (["a", "b", "c"], ["c", "a", "c", "c"], [0.25, 0, 0.75]), ([str(i) for i in range(10)], ["3", "7"],
                                                                   [0, 0, 0, 0.5, 0, 0, 0, 0.5, 0, 0]),
        (None, ["x", "y", "z", "z"], [0.25, 0.25, 0.5]), (None, ["2", "0"], [0.5, 0, 0.5])])
    def test_shares_of_the_data(self, tmp_path, names, folders, expected):
        write_folder(tmp_path / "real", random_images(len(folders), 16), folders)
        reference = calc_metrics.open_reference(str(tmp_path / "real"), True, 0)
        opts = types.SimpleNamespace(labels="dataset", data=str(tmp_path / "real"), ref=None, network="net.pkl")
        network = types.SimpleNamespace(G_ema=types.SimpleNamespace(c_dim=len(expected)), class_names=names)
        assert calc_metrics.label_probs(opts, network, reference).tolist() == expected
        network.class_names = [f"k{i}" for i in range(len(expected))]
        if folders[0] in "cx":
            with pytest.raises(UserError, match=r"real: has the classes .*, but --network=net\.pkl has k0, k1, k2"):
                calc_metrics.label_probs(opts, network, reference)

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestStatistics:
    def test_round_trip(self, data, tmp_path):
        want = (f"--images={data}/gen", "--metrics=fid", *TINY)
        direct = run(*want, f"--data={data}/real", "--no-cache")[0]
        result = call("--device=cpu", f"--data={data}/real", f"--save-ref={tmp_path}/ref.npz", "--detector=tiny")
        assert result.exit_code == 0
        assert "statistics of 60 images by tiny" in result.stderr
        stored = run(*want, f"--ref={tmp_path}/ref.npz")[0]
        assert stored["results"]["fid"] == approx(direct["results"]["fid"], rel=1e-9)
        assert stored["num_real"] == 60
        assert stored["reference_fingerprint"] == direct["reference_fingerprint"]
        refused("pr: not computable from", *want, f"--ref={tmp_path}/ref.npz", "--metrics=pr")
        write_folder(data / "small", random_images(NUM, 8))
        refused("the generated images have 8x8 pixels, the reference 16x16", f"--images={data}/small", "--metrics=fid",
                *TINY, f"--ref={tmp_path}/ref.npz")

    def test_foreign_file_with_images(self, data, tmp_path):
        run(f"--data={data}/real", f"--save-ref={tmp_path}/ref.npz", "--detector=tiny")
        real = np.stack([np.asarray(x) for x in random_images(60, 16, seed=2).transpose(0, 2, 3, 1)])
        with np.load(tmp_path / "ref.npz") as ref:
            np.savez(tmp_path / "adm.npz", mu=ref["mu@tiny"].astype(np.float32), sigma=ref["sigma@tiny"], arr_0=real)
        fid, pr = run(f"--images={data}/gen", f"--ref={tmp_path}/adm.npz", "--metrics=fid,pr", *TINY)
        assert fid["num_real"] is None
        assert "not recorded" in fid["reference"]["detector"]
        direct = run(f"--images={data}/gen", f"--ref={data}/real", "--metrics=pr", *TINY)[0]
        assert pr["results"] == direct["results"]

    def test_saving_beside_scoring(self, data, tmp_path):
        records = run(f"--images={data}/gen", f"--data={data}/real", "--metrics=fid", *TINY, "--mirror=1",
                      f"--save-ref={tmp_path}/ref.npz")
        assert records[0]["num_real"] == 120
        with np.load(tmp_path / "ref.npz") as ref:
            assert int(ref["num_images"]) == 120
        want = (f"--images={data}/gen", f"--ref={tmp_path}/ref.npz", "--metrics=fid", *TINY)
        assert run(*want, "--mirror=1")[0]["results"]["fid"] == approx(records[0]["results"]["fid"], rel=1e-9)
        refused("was saved with --mirror=1, but the metric takes real images as they are", *want)

#----------------------------------------------------------------------------

class TestNetwork:
    @pytest.fixture
    def network(self, tmp_path):
        from training.config import to_dict
        from training.generator.layer_schedule import stem_config
        from training.networks_stylegan3 import Generator
        from training.run.formats import NETWORK_FORMAT, VERSION
        torch.manual_seed(0)
        config = stem_config(16, 6, 256, 16, c_dim=3)
        checkpoint.save(tmp_path / "net.pkl", {
            "format": NETWORK_FORMAT, "version": VERSION, "generator_config": to_dict(config),
            "G_ema": Generator(config).state_dict(), "class_names": ["a", "b", "c"], "progress": {}})
        return tmp_path / "net.pkl"

    @pytest.mark.parametrize("labels", ["dataset", "uniform", "balanced"])
    def test_policies(self, data, network, labels):
        record = run(f"--network={network}", f"--data={data}/real", "--metrics=fid", f"--labels={labels}", "--seed=3",
                     "--trunc=0.7", "--batch=16", *TINY)[0]
        assert (record["label_policy"], record["seed"], record["truncation_psi"]) == (labels, 3, 0.7)
        assert record["snapshot_pkl"] == str(network)
        assert len(record["network_sha256"]) == 64
        assert record["generated"]["resolution"] == 16

    def test_classes_of_the_data(self, data, network):
        want = (f"--network={network}", "--metrics=fid", *TINY)
        refused("--labels=dataset: classes are drawn as the reference data set has them, but it has no labels",
                *want, f"--data={data}/gen")
        labels = {"labels": [[f"{i:06d}.png", i % 4] for i in range(60)]}
        (data / "real" / "dataset.json").write_text(json.dumps(labels))
        refused("real: has the classes 0, 1, 2, 3, but --network=", *want, f"--data={data}/real")

    def test_without_reference(self, network):
        record = run(f"--network={network}", "--metrics=is", "--labels=uniform", *TINY)[0]
        assert set(record["results"]) == {"is_mean", "is_std"}
        refused("compares with real images", f"--network={network}", "--metrics=fid", "--labels=uniform", *TINY)

    def test_other_size(self, data, network):
        write_folder(data / "big", random_images(5, 32))
        refused("generated images have 16x16 pixels, the reference 32x32", f"--network={network}", "--metrics=fid",
                f"--data={data}/big", "--labels=uniform", *TINY)

#----------------------------------------------------------------------------

def test_several_processes_are_started_by_the_launcher(data, monkeypatch):
    asked = []
    monkeypatch.setattr(calc_metrics.distributed, "run_local_processes", lambda n, argv: asked.append((n, argv)) or 7)
    result = call(f"--images={data}/gen", f"--data={data}/real", "--metrics=fid", "--gpus=2", *TINY)
    assert result.exit_code == 7
    assert asked == [(2, sys.argv)]
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    refused("--gpus=2: torchrun started 3 processes", f"--images={data}/gen", f"--data={data}/real", "--gpus=2")

#----------------------------------------------------------------------------

class TestMistakes:
    def test_flags(self, data):
        gen, real = f"--images={data}/gen", f"--data={data}/real"
        refused("nothing to score: name a generator by --network or images by --images")
        refused("--network and --images: name one", gen, "--network=x.pkl", real)
        refused("--data and --ref: both", gen, real, f"--ref={data}/real")
        refused("--save-ref=x.npz: name the images", "--save-ref=x.npz")
        refused("--trunc=0.5: has no effect without --network", gen, real, "--trunc=0.5", "--metrics=fid", *TINY)
        refused("--precision=bf16: has no effect without --network", gen, real, "--precision=bf16", "--metrics=fid",
                *TINY)
        refused("fid50k_full is defined with inception-2015-12-05", gen, real, "--detector=tiny")
        refused("unknown metric 'fid51k'", gen, real, "--metrics=fid51k")
        refused("unknown detector: choose from dinov2-vitl14, inception-2015-12-05", gen, real, "--metrics=fid",
                "--detector=resnet")

    def test_values_that_click_refuses(self):
        for arg in ("--num=0", "--batch=0", "--seed=-1", "--labels=some", "--gpus=0", "--device=tpu", "--mirror=maybe"):
            result = call(arg)
            assert result.exit_code == 2
            assert arg.split("=")[0] in result.stderr

    def test_files(self, data, tmp_path):
        real = ("--metrics=fid", f"--data={data}/real", *TINY)
        refused("no such file or folder", f"--images={data}/absent", *real)
        refused("no such file or folder", f"--images={data}/absent", *real, "--gpus=2")
        (tmp_path / "text.txt").write_text("hello")
        refused("neither a folder, a zip archive nor an .npz", f"--images={tmp_path}/text.txt", *real)
        np.savez(tmp_path / "float.npz", np.zeros([3, 16, 16, 3]))
        refused("arr_0 is float64, but images must be uint8", f"--images={tmp_path}/float.npz", *real)
        np.savez(tmp_path / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
        refused("holds statistics, not images", f"--images={tmp_path}/stats.npz", *real)
        np.savez(tmp_path / "wide.npz", mu=np.zeros(17), sigma=np.eye(17))
        refused("have 17 dimensions, those of detector tiny 16", f"--images={data}/gen", "--metrics=fid", *TINY,
                f"--ref={tmp_path}/wide.npz")
        refused("absent.safetensors", f"--images={data}/gen", "--metrics=fid",
                f"--detector={tmp_path}/absent.safetensors", f"--data={data}/real")
        refused("no such file", "--network=absent.pkl", *real)
        refused("holds statistics already", f"--ref={tmp_path}/stats.npz", f"--save-ref={tmp_path}/x.npz",
                "--detector=tiny")

    def test_too_few_images(self, data):
        refused(f"has {NUM} images, the metric asks for 50000", f"--images={data}/gen", f"--data={data}/real",
                "--metrics=fid", "--detector=tiny")
        refused(f"has {NUM} images, the metric asks for 41", f"--images={data}/gen", f"--data={data}/real",
                "--metrics=fid", "--detector=tiny", "--num=41")

    def test_weights_are_missing(self, data):
        refused("weights-inception-2015-12-05-6726825d.pth: it is not on this machine and downloads are off",
                f"--images={data}/gen", f"--data={data}/real", "--offline")

#----------------------------------------------------------------------------

@pytest.mark.slow
def test_as_a_program_with_the_real_architecture(data, tmp_path):
    """From another folder, in its own process, with Inception at random weights."""
    write_folder(data / "few", random_images(3, 16))
    command = [sys.executable, str(ROOT / "calc_metrics.py"), f"--images={data}/gen.npz", f"--ref={data}/few",
               "--metrics=kid", "--detector=inception-2015-12-05:random", "--num=3", "--device=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "STYLESAN_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["metric"] for record in records] == ["kid"]
    assert records[0]["detector"] == "inception-2015-12-05:random"
    assert "Traceback" not in done.stderr

#----------------------------------------------------------------------------

@pytest.mark.usefixtures("tiny_inception")
@pytest.mark.numeric
class TestAdm:
    def lines(self, stdout):
        return dict(line.split(": ") for line in stdout.splitlines())

    def test_the_command_line_of_its_evaluator(self, data):
        plain = call("--device=cpu", f"--num={NUM}", f"{data}/real", f"{data}/gen.npz")
        assert plain.exit_code == 0, plain.stderr
        assert [line.split(": ")[0] for line in plain.stdout.splitlines()] == [
            "Inception Score", "FID", "sFID", "Precision", "Recall"]
        flags = call("--device=cpu", f"--num={NUM}", f"--ref={data}/real", f"--images={data}/gen.npz", "--metrics=adm")
        assert plain.stdout in flags.stderr                 # There JSON has stdout for itself.
        values = {key.partition("@")[0]: value for record in json_lines(flags.stdout)
                  for key, value in record["results"].items()}
        assert list(values) == ["adm_is50k", "adm_fid50k", "adm_sfid50k", "adm_pr50k_precision", "adm_pr50k_recall"]
        assert [float(value) for value in self.lines(plain.stdout).values()] == list(values.values())

    def test_records_go_to_a_folder(self, data, tmp_path):
        call("--device=cpu", f"--num={NUM}", f"--out={tmp_path}/out", f"{data}/real", f"{data}/gen.npz")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            f"metric-{name}@num={NUM}.jsonl" for name in ("adm_fid50k", "adm_is50k", "adm_pr50k", "adm_sfid50k")]

    def test_mistakes(self, data):
        refused("a.npz: without flags there are two files, REF SAMPLES", "a.npz")
        refused("--images=b.npz: does not go with REF SAMPLES", "a.npz", "b.npz", "--images=b.npz")
        refused("REF SAMPLES stands for --metrics=adm", "a.npz", "b.npz", "--metrics=fid")
        refused("has 40 images, the metric asks for 50000: supply more, or set --num=40", f"{data}/real",
                f"{data}/gen.npz")

    def test_a_saved_reference_serves_all_of_it(self, data, tmp_path):
        want = ("--metrics=adm", f"--images={data}/gen", f"--num={NUM}")
        direct = run(*want, f"--data={data}/real", "--no-cache", f"--save-ref={tmp_path}/ref.npz")
        with np.load(tmp_path / "ref.npz") as ref:
            assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} < set(ref.files)
        stored = run(*want, f"--ref={tmp_path}/ref.npz")
        for a, b in zip(direct, stored, strict=True):
            for key, value in a["results"].items():
                assert b["results"][key] == approx(value, rel=1e-9), key
        assert [r["reference"]["used"] for r in stored[1:]] == ["statistics", "statistics", "images"]
        assert [r["num_real"] for r in stored] == [None, 60, 60, 60]

    def test_sorted_samples(self, data):
        result = call("--device=cpu", f"--images={data}/classes", f"--num={NUM}", "--metrics=adm_is50k")
        assert "adm_is50k takes the images in file order, and they are sorted by class" in result.stderr
        result = call("--device=cpu", f"--images={data}/gen", f"--num={NUM}", "--metrics=adm_is50k")
        assert "sorted by class" not in result.stderr


@pytest.mark.usefixtures("tiny_inception")
def test_all_images_that_there_are(data):
    record = run(f"--images={data}/gen", f"--ref={data}/real", "--metrics=pytorch_fid")[0]
    assert (record["metric"], record["num_gen"], record["num_real"]) == ("pytorch_fid", NUM, 60)
    write_folder(data / "one", random_images(1, 16))
    refused("--metrics=pytorch_fid: 1 real image is too few", f"--images={data}/gen", f"--ref={data}/one",
            "--metrics=pytorch_fid")


def test_the_generator_itself_is_needed(data):
    refused("--metrics=ppl2_wend,eqr50k: measures the generator itself: name it with --network", f"--images={data}/gen",
            "--metrics=ppl2_wend,eqr50k,fid", f"--num={NUM}")


def test_a_value_that_is_no_number_is_no_result(data, replace):
    for mu, sigma in ((0, 1e308), (1e200, 1)):          # Finite, but not their products.
        np.savez(data / "ref.npz", mu=np.full(16, float(mu)), sigma=np.eye(16) * sigma)
        refused("which no features have: make the file again", f"--images={data}/gen", f"--ref={data}/ref.npz",
                "--metrics=fid", *TINY)
    kind = METRICS["fid"].kind
    broken = dataclasses.replace(kind, compute=lambda *_: ({"fid": float("nan")}, {}))
    replace(METRICS, "fid", dataclasses.replace(METRICS["fid"], kind=broken))
    refused("fid: fid is nan: the numbers of one side are too large", f"--images={data}/gen", f"--ref={data}/real",
            "--metrics=fid", *TINY)


def test_nothing_to_compute(data):
    for metrics in ("none", ""):
        refused("--metrics=none: leaves nothing to compute: name a metric", f"--images={data}/gen",
                f"--ref={data}/real", f"--metrics={metrics}")
