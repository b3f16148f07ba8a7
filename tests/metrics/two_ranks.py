# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation that test_two_ranks.py runs in one process and, as a program, in two."""
import contextlib
import json
import sys

import torch

from metrics.detectors import DETECTORS
from metrics.metric_main import evaluate
from metrics.options import MetricOptions
from metrics.passes import on_rank0
from metrics.references import Reference
from tests.metrics.helpers import ArraySource, SequentialSource, random_images, tiny_kind
from torch_utils import distributed

NAMES = ["fid", "kid", "pr", "is", "sfid", "adm", "sfid50k_full", "fid50k", "pr50k3_full", "clean_fid50k"]


def score(folder: str, device: torch.device) -> None:
    """Write values and how many images each process made to `folder`/result.json."""
    # 333 and 200 images: multiples of neither the detector's batch nor the number of processes.
    gen, real = ArraySource(random_images(333, seed=2)), SequentialSource(random_images(200, seed=1))
    options = MetricOptions(device=device, num=333, batch_size=50, out_dir=folder)
    first = evaluate(NAMES, lambda num: gen, Reference(real), options)
    again = evaluate(NAMES[:2], lambda num: gen, Reference(real), options)              # From the cache.
    assert [r["results"] for r in again] == [r["results"] for r in first[:2]]
    assert len(set(distributed.all_gather_object(json.dumps([r["results"] for r in first])))) == 1
    num_read = distributed.all_gather_object(gen.num_read)
    if distributed.rank() == 0:
        with open(f"{folder}/result.json", "w", encoding="utf-8") as f:
            json.dump({"values": {k: v for r in first for k, v in r["results"].items()}, "num_read": num_read}, f)


def failure_reaches_all() -> bool:
    """What fails on process 0 fails everywhere."""
    try:
        on_rank0(lambda: 1 // 0)
    except ZeroDivisionError:
        return True
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        for name in ("inception-2015-12-05", "inception-2015-12-05-clean", "vgg16"):
            stack.enter_context(DETECTORS.replaced(name, tiny_kind()))
        score(sys.argv[1], distributed.init("cpu"))
    assert all(distributed.all_gather_object(failure_reaches_all()))
    distributed.shutdown()
