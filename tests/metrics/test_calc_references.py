# SPDX-License-Identifier: Apache-2.0
"""The command with every kind of reference and of images: equal content gives equal numbers, and the kind is said."""
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch

from metrics.references import load_statistics
from tests.closeness import approx
from tests.metrics.helpers import random_images, write_folder
from tests.metrics.test_calc_metrics import call, refused, run
from torch_utils.own_network import OwnNetwork, own_config, save_own_network

NUM = 40
INCEPTION = "inception-2015-12-05"


@pytest.fixture
def data(tmp_path, tiny_inception):
    """Generated and real images, and statistics of the real ones made by the command itself."""
    gen, real = random_images(NUM, 16, seed=1, shift=20), random_images(60, 16, seed=2)
    write_folder(tmp_path / "gen", gen)
    np.savez(tmp_path / "gen.npz", np.ascontiguousarray(gen.transpose(0, 2, 3, 1)))
    with tarfile.open(tmp_path / "gen.tar", "w") as archive:
        archive.add(tmp_path / "gen", "samples")
    write_folder(tmp_path / "real", real)
    result = call("--device=cpu", "--verbose=0", f"--data={tmp_path}/real", f"--save-ref={tmp_path}/ref.npz",
                  "--save-ref-images=50")
    assert result.exit_code == 0, result.stderr
    return tmp_path


@pytest.fixture
def fid(data):
    """A function: FID and sFID against a reference, and what went to stderr."""
    def compute(ref, images="gen", metrics="fid"):
        result = call("--device=cpu", "--verbose=0", f"--images={data}/{images}", f"--ref={data}/{ref}",
                      f"--metrics={metrics}", f"--num={NUM}", "--no-cache")
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()], result.stderr
    return compute


def value(records):
    return next(iter(records[0]["results"].values()))

#----------------------------------------------------------------------------

def test_images_of_every_kind(fid):
    want, said = fid("real")
    assert "gen: folder, 40 images of 16x16 pixels" in said
    for images, kind in (("gen.npz", "npz of samples"), ("gen.tar", "tar archive")):
        records, said = fid("real", images)
        assert value(records) == value(want)
        assert f"{images}: {kind}, 40 images of 16x16 pixels" in said
        assert records[0]["generated"]["format"].startswith(kind)


@pytest.mark.numeric
def test_our_file(data, fid):
    want, _ = fid("real")
    records, said = fid("ref.npz")
    assert value(records) == approx(value(want), rel=1e-9)
    assert f"ref.npz: our reference npz, pool of {INCEPTION}, spatial of {INCEPTION}, 50 images" in said
    assert (records[0]["num_real"], records[0]["reference"]["format"]) == (60, "our reference npz")
    with np.load(data / "ref.npz", allow_pickle=False) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
        assert file["arr_0"].shape == (50, 16, 16, 3)
        assert INCEPTION in json.loads(str(file["metadata"]))["resize"]


@pytest.mark.numeric
def test_statistics_of_a_judge_named_by_its_path(data, tmp_path):
    """The file says 'local:judge.safetensors', the flag where it lies."""
    torch.manual_seed(0)
    save_own_network(tmp_path / "judge.safetensors", OwnNetwork(own_config(3, 16, (8, 12))))
    judge = f"--detector={tmp_path}/judge.safetensors"
    assert call("--device=cpu", f"--data={data}/real", judge, f"--save-ref={tmp_path}/own.npz").exit_code == 0
    record = run(f"--images={data}/gen", judge, "--metrics=fid", f"--num={NUM}", f"--ref={tmp_path}/own.npz")[0]
    want = run(f"--images={data}/gen", judge, "--metrics=fid", f"--num={NUM}", f"--data={data}/real")[0]
    assert record["results"]["fid"] == approx(want["results"]["fid"], rel=1e-6)
    assert record["reference"]["used"] == "statistics"


@pytest.mark.numeric
def test_foreign_files(data, fid):
    """What ADM, pytorch-fid, EDM2 and StyleGAN would have written of the same images."""
    want, _ = fid("real", metrics="adm_fid50k")
    pool, spatial = load_statistics(data / "ref.npz")
    cov, mean, num = pool.covariance_at(1), pool.mean, pool.num_images
    np.savez(data / "adm.npz", mu=mean.astype(np.float32), sigma=cov, mu_s=spatial.mean,
             sigma_s=spatial.covariance_at(1))
    np.savez(data / "edm.npz", mu=mean, sigma=cov)
    (data / "edm2.pkl").write_bytes(pickle.dumps({"num_images": num, "fid": {"mu": mean, "sigma": cov}}))
    outer = num * (pool.covariance + np.outer(mean, mean))
    name = f"real-{INCEPTION}-{'0' * 32}.pkl"
    (data / name).write_bytes(pickle.dumps({"capture_all": False, "capture_mean_cov": True, "max_items": None,
                                            "num_items": num, "num_features": 16, "all_features": None,
                                            "raw_mean": mean * num, "raw_cov": outer}))
    for file, kind in (("adm.npz", "ADM reference npz"), ("edm.npz", "npz with mu and sigma"),
                       ("edm2.pkl", "EDM2 reference pickle"), (name, "StyleGAN statistics cache")):
        records, said = fid(file, metrics="adm_fid50k")
        assert value(records) == approx(value(want), rel=1e-5)
        assert kind in said
        assert ("does not say which detector" in said) == (file == "edm.npz")
        assert records[0]["reference"]["format"] == kind
    refused("adm_pr50k: not computable from", f"--images={data}/gen", f"--ref={data}/adm.npz", "--metrics=adm_pr50k",
            f"--num={NUM}")
    refused("not computable from", f"--images={data}/gen", f"--ref={data}/edm2.pkl", "--metrics=adm_sfid50k",
            f"--num={NUM}")


@pytest.mark.numeric
def test_our_file_replaces_adms(data, fid):
    """All five lines from one file, images included."""
    records, _ = fid("ref.npz", metrics="adm")
    assert len(records) >= 4
    direct, _ = fid("real", metrics="adm_sfid50k")
    sfid = next(r for r in records if "sfid" in r["metric"])
    assert value([sfid]) == approx(value(direct), rel=1e-9)
    assert sfid["num_real"] == 60


def test_crops_that_differ_are_warned_of(data, fid):
    (data / "gen.report.json").write_text(json.dumps({"transform": "center-crop"}))
    np.savez(data / "adm.npz", mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(12), sigma_s=np.eye(12))
    _, said = fid("adm.npz")
    assert "Warning: the generated images were cut by center-crop, the reference by center-crop-dhariwal" in said
    (data / "real.report.json").write_text(json.dumps({"transform": "center-crop"}))
    _, said = fid("real", metrics="adm_fid50k")
    assert "adm_fid50k" in next(line for line in said.splitlines() if "ADM's is cut by center-crop-dhariwal" in line)
    run(f"--data={data}/real", f"--save-ref={data}/cropped.npz")
    assert load_statistics(data / "cropped.npz")[0].crop == "center-crop"
    assert "cut by" not in fid("cropped.npz")[1]


def test_mistakes(data):
    gen = (f"--images={data}/gen", "--metrics=fid", f"--num={NUM}")
    (data / "code.pkl").write_bytes(b"cos\nsystem\n(S'touch trap'\ntR.")
    refused("neither a folder", *gen, f"--ref={data}/code.pkl")
    (data / "code2.pkl").write_bytes(b"\x80\x02cposix\nmkdir\nX\x04\x00\x00\x00trap\x85R.")
    refused("nothing was run", *gen, f"--ref={data}/code2.pkl")
    refused("holds statistics already", f"--ref={data}/ref.npz", f"--save-ref={data}/x.npz")
    refused("--save-ref-images=5: has no effect without --save-ref", *gen, f"--ref={data}/real", "--save-ref-images=5")
    np.savez(data / "stats.npz", mu=np.zeros(16), sigma=np.eye(16))
    refused("holds statistics, not images", f"--images={data}/stats.npz", "--metrics=fid", f"--ref={data}/real")
