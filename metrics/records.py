# SPDX-License-Identifier: Apache-2.0
"""Results as one JSON object each: the values, and all that is needed to get them again."""
import functools
import importlib.metadata
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import append_text, format_time
from metrics.detectors import Detector
from metrics.jobs import Job
from metrics.references import Reference
from metrics.sources import ImageSource
from torch_utils import distributed

PACKAGE = "stylesan-xl"
ROOT = Path(__file__).resolve().parents[1]

#----------------------------------------------------------------------------

@functools.cache
def code_version() -> dict[str, str | None]:
    """Versions of this project, of its commit where it runs from a checkout, and of the libraries that compute."""
    def installed(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = None
    if (ROOT / ".git").exists():
        try:
            command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
            answer = subprocess.run(command, cwd=ROOT, timeout=20, capture_output=True, encoding="utf-8",
                                    errors="replace", check=False)
            commit = answer.stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):
            commit = None
    return {PACKAGE: installed(PACKAGE), "commit": commit, "torch": torch.__version__,
            "torch-fidelity": installed("torch-fidelity"), "torchvision": installed("torchvision")}


def result(job: Job, values: dict[str, float], settings: dict[str, Any], detector: Detector | None, source: ImageSource,
           reference: Reference | None, more: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The record of one metric.

    Args:
        job: The metric.
        values: Suffix of the metric's name -> value.
        settings: What the formula was run with, with `num_real` and `ddof` where they apply; a measurement of the
            generator also says `detector`, `detector_sha256` and `detector_unverified` there.
        detector: Whose features were used; None for a measurement of the generator.
        source: The generated images.
        reference: The real side.
        more: Added as it is (snapshot_pkl, ...).
        seconds: Since the evaluation began; work that metrics share is in all of theirs.
    """
    made = {key: value for key, value in source.description.items() if key != "class_names"}    # May be thousands.
    own = ("num_real", "ddof", "detector", "detector_sha256", "detector_unverified")
    return {
        "results": {job.title + suffix + job.mark: value for suffix, value in values.items()},
        "metric": job.name,
        "asked_for": job.metric.name,
        "protocol": job.metric.protocol,
        "lower_is_better": job.metric.kind.lower_is_better,
        "total_time": seconds,
        "total_time_str": format_time(seconds),
        "num_gpus": distributed.world_size(),
        "timestamp": time.time(),
        **_of_detector(detector, settings),
        "num_real": settings.get("num_real"),
        "num_gen": job.num,
        "ddof": settings.get("ddof"),
        "label_policy": made.get("labels"),
        "seed": made.get("seed"),
        "truncation_psi": made.get("truncation_psi"),
        "settings": {key: value for key, value in settings.items() if key not in own},
        "generated": {**made, "fingerprint": source.fingerprint},
        **_of_reference(job, detector, reference),
        "version": code_version(),
        **more,
    }


def _of_detector(detector: Detector | None, settings: dict[str, Any]) -> dict[str, Any]:
    if detector is None:
        found = {"detector": settings.get("detector"), "detector_sha256": settings.get("detector_sha256"),
                 "resize": None}
        is_verified = not settings.get("detector_unverified")
    else:
        found = {"detector": detector.name, "detector_sha256": detector.sha256, "resize": detector.resize or None}
        is_verified = detector.verified
    return found if is_verified else {**found, "detector_unverified": True}


def _of_reference(job: Job, detector: Detector | None, reference: Reference | None) -> dict[str, Any]:
    """What the metric compared with: the stored statistics it used, or the images."""
    if reference is None or detector is None or not job.has_real_side:
        return {"reference": None, "reference_fingerprint": None}
    stored = next((x for output in job.outputs if (x := reference.statistics_for(detector.name, output))), None)
    used = reference.source if stored is None else stored
    fingerprint = None if used is None else used.fingerprint
    return {"reference": reference.describe(stored), "reference_fingerprint": fingerprint}


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON, without a line break."""
    return json.dumps(record, allow_nan=False, default=str)


def append_line(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Append a record to metric-<name>.jsonl in `folder`; earlier lines stay."""
    path = Path(folder) / f"metric-{record['metric']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    append_text(path, json_line(record) + "\n")


# What ADM's evaluator prints, and the result that it stands for.
ADM_LINES = (("Inception Score", "adm_is50k"), ("FID", "adm_fid50k"), ("sFID", "adm_sfid50k"),
             ("Precision", "adm_pr50k_precision"), ("Recall", "adm_pr50k_recall"))


def adm_lines(results: list[dict[str, Any]]) -> list[str]:
    """The results of ADM's protocols in the words and the order of ADM's evaluator."""
    values = {key.partition("@")[0]: value for record in results for key, value in record["results"].items()}
    return [f"{title}: {values[key]}" for title, key in ADM_LINES if key in values]


def table(results: list[dict[str, Any]]) -> str:
    """Values for people: one line per value with the numbers of images, the detector and the label policy."""
    rows = [("metric", "value", "generated", "real", "detector", "labels")]
    for record in results:
        for key, value in record["results"].items():
            rows.append((key, f"{value:.6g}", str(record["num_gen"]), str(record["num_real"] or "-"),
                         record["detector"] or "-", record["label_policy"] or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in rows)
