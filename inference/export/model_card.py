# SPDX-License-Identifier: Apache-2.0
"""The page that stands beside a shared network: what it is, what it was trained on, and how good it is.

Everything comes from the snapshot and from the files of the run that it lies in. Of paths only the last names are
shown.
"""
import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.hub import WEIGHTS_FILE
from dnnlib.util import list_some, printable
from torch_utils.misc import count_parameters
from training.networks_stylegan3 import Generator
from training.run.snapshots import Snapshot, images_shown
from training.run.sources import get_setting
from training.watch.html_report import read_objects

SHEET_FILE = "samples.png"
NAMED_CLASSES = 20          # So many names stand on the page; all of them are in the file.
TASK = "unconditional-image-generation"     # The hub has no task for images of classes.
NOT_KNOWN = "not recorded in the file"
UNKNOWN_LICENCE = "unknown"                 # The hub's own word.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Subject:
    """The network that the page is about."""

    G: Generator
    snapshot: Snapshot
    path: Path              # The file that it came from; the record of its run lies beside it.
    sha256: str


def repository(name: str) -> str:
    """The name of a model as the hub takes it: letters, digits, and '-', '_' and '.' between them."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-._") or "model"


def metric_records(folder: Path, snapshot: Snapshot, sha256: str) -> list[dict[str, Any]]:
    """Results in metric-*.jsonl that are of this snapshot: by the images shown, or by the content of the file.

    Of two results of one metric under the same settings the later counts. A network that was tuned to a picture is not
    the one of this moment.
    """
    nimg = None if snapshot.get("tuned_to") else (snapshot.get("progress") or {}).get("cur_nimg")
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("metric-*.jsonl")):
        for record in read_objects(path):
            name, made = record.get("snapshot_pkl"), record.get("generated")
            is_same_moment = nimg is not None and isinstance(name, str) and images_shown(Path(name).name) == nimg
            is_same_file = isinstance(made, dict) and made.get("fingerprint") == sha256
            if (is_same_moment or is_same_file) and isinstance(record.get("results"), dict):
                key = [record.get(name) for name in ("metric", "label_policy", "truncation_psi", "detector_sha256")]
                found[tuple(map(str, key))] = record
    return list(found.values())


def _cell(value: Any) -> str:
    """A value in one cell of a table, whatever is in it."""
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else printable(str(value))[:200]
    for letter, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\["), ("*", "\\*")):
        text = text.replace(letter, written)
    return text


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """The first row is the head."""
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _last_name(path: Any) -> str:
    """Of a path of any system, without the folders above, which are nobody's business."""
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]

#----------------------------------------------------------------------------

def _network_rows(G: Generator) -> list[tuple[str, Any]]:
    config = G.config
    kernels = sorted({layer.conv_kernel for layer in config.layers if not layer.is_torgb})
    kind = {"3": "stylegan3-t", "1": "stylegan3-r"}.get("".join(map(str, kernels)), "layers of stylegan3-t and -r")
    return [("resolution", f"{G.img_resolution} x {G.img_resolution}"), ("classes", G.c_dim or "none"),
            ("configuration", kind), ("layers", len(config.layers)), ("z, w", f"{G.z_dim}, {G.w_dim}"),
            ("parameters", f"{count_parameters(G):,}")]


def data_name(snapshot: Snapshot) -> str | None:
    """What the training data are called, without the folders above."""
    path = get_setting(snapshot.get("options") or {}, "data.path") or \
        (snapshot.get("training_set_kwargs") or {}).get("path")
    return None if path is None else _last_name(path)


def _training_rows(snapshot: Snapshot) -> list[tuple[str, Any]]:
    options = snapshot.get("options") or {}
    nimg = (snapshot.get("progress") or {}).get("cur_nimg")
    rows: list[tuple[str, Any]] = [
        ("data", data_name(snapshot) or NOT_KNOWN),
        ("images shown", NOT_KNOWN if not isinstance(nimg, int | float) else f"{nimg / 1e3:g} kimg")]
    backbones = get_setting(options, "discriminator.backbones")
    if isinstance(backbones, list | tuple):
        rows.append(("feature networks of D", ", ".join(map(_last_name, backbones))))
    for title, name in (("x-flips", "data.mirror"), ("batch", "batch"), ("SAN heads", "discriminator.san"),
                        ("weight of guidance", "loss.cls_weight"), ("seed", "seed")):
        if (value := get_setting(options, name)) is not None:
            rows.append((title, ("no", "yes")[value] if isinstance(value, bool) else value))
    for title, name in (("grown on", "path_stem"), ("began with", "init_from"), ("continued", "resume")):
        if (value := get_setting(options, name)) is not None:
            rows.append((title, _last_name(value)))
    if tuned_to := snapshot.get("tuned_to"):
        rows.append(("tuned to", _last_name(get_setting(tuned_to, "target"))))
    return rows


def _metric_rows(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("metric", "value", "protocol", "generated", "real", "detector", "classes", "psi")]
    for record in records:
        detector = record.get("detector")
        if detector is not None and record.get("detector_sha256"):
            detector = f"{_last_name(detector)} (sha256 {str(record['detector_sha256'])[:12]})"
        real = record.get("num_real") or (None if record.get("reference") is None else "all")
        for name, value in record["results"].items():
            rows.append((name, value, record.get("protocol"), record.get("num_gen"), real, detector,
                         record.get("label_policy"), record.get("truncation_psi")))
    return rows


def _metrics_text(snapshot: Snapshot, records: list[dict[str, Any]]) -> str:
    score = snapshot.get("score")
    if records:
        return (_table(_metric_rows(records)) + "\n\nA protocol fixes the detector, the numbers of images and the "
                "formula; where it is free, the row says them.\nValues of different protocols or detectors cannot be "
                "compared.")
    if score:
        return f"In training {_cell(score['metric'])} was {_cell(score['value'])}. Beside the file lies no more of it."
    return "None are recorded beside the file."


def _metric_name(record: dict[str, Any], key: str) -> str:
    """What the hub calls a result: a FID in the features of another detector must not be taken for one."""
    if record.get("protocol") != "free":
        return key
    return f"{key} ({_last_name(record.get('detector') or NOT_KNOWN)}, {record.get('num_gen')} images)"


def _front_matter(subject: Subject, name: str, licence: str, records: list[dict[str, Any]]) -> str:
    """What the hub reads, written by its own library, which knows how."""
    from huggingface_hub import EvalResult, ModelCardData

    data = data_name(subject.snapshot)
    results = [EvalResult(task_type=TASK, dataset_type=data, dataset_name=data,
                          metric_type=_metric_name(record, key), metric_value=float(value))
               for record in records for key, value in record["results"].items()
               if data is not None and isinstance(value, int | float) and math.isfinite(value)]
    card = ModelCardData(license=licence, library_name="stylesan-xl", pipeline_tag=TASK, model_name=name,
                         tags=["gan", "stylegan-xl", "san", "image-generation"], eval_results=results or None)
    return card.to_yaml().strip()


def model_card(subject: Subject, name: str, licence: str) -> str:
    """README.md of a folder for the hub.

    Args:
        name: What the model is called.
        licence: An identifier of the hub, such as cc-by-4.0.
    """
    G, snapshot = subject.G, subject.snapshot
    records = metric_records(subject.path.parent, snapshot, subject.sha256)
    names = snapshot.get("class_names") if G.c_dim > 0 else None
    classes = f"\nClasses: {_cell(list_some(names, NAMED_CLASSES))}.\n" if names else ""
    said = "The licence of these weights was not stated." if licence == UNKNOWN_LICENCE else \
        f"The weights are under: {_cell(licence)}."
    return f"""---
{_front_matter(subject, name, licence, records)}
---

# {_cell(name)}

A generator of images, of StyleGAN-XL's architecture. These samples are neither picked nor truncated\
{"; each row is a class" if G.c_dim else ""}:

![samples]({SHEET_FILE})

## Use

```python
from legacy import load_network

G = load_network("hf://USER/{repository(name)}").G_ema      # Or the path of this folder.
```

```sh
python gen_images.py --network=hf://USER/{repository(name)} --seeds=0-7 --outdir=out
```

## Network

{_table([("", ""), *_network_rows(G)])}
{classes}
## Training

{_table([("", ""), *_training_rows(snapshot)])}

## Metrics

{_metrics_text(snapshot, records)}

## Licence

{said}

## Files

`{WEIGHTS_FILE}` holds the averaged generator and, in its header, the settings to build it. The discriminator and the
state of the optimisers are not in it. It was made from `{_cell(subject.path.name)}` (sha256 {subject.sha256}).
"""
