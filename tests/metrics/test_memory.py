# SPDX-License-Identifier: Apache-2.0
"""Peak memory: nothing grows with the square of the number of images, and features are held once."""
import os
import subprocess
import sys

import pytest

# What a fresh process needs on top of imports and arguments, in MB. VmHWM, because ru_maxrss begins with the memory of
# the process that started this one. Neither ever falls, so each script runs alone.
PRELUDE = """
import re
import numpy as np, torch
torch.set_num_threads(1)
def peak():
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", f.read())[1]) * 1.024e-3
"""
NEIGHBOURS = PRELUDE + """
from metrics.precision_recall import precision_recall
real, gen = torch.rand(8000, 256), torch.rand(8000, 256)
precision_recall(real[:9], gen[:9])
before = peak()
precision_recall(real, gen)
print(peak() - before)
"""
ROWS = PRELUDE + """
from metrics.feature_stats import Rows
from torch_utils import distributed
batch = torch.ones(64, 2048)
before = peak()
rows = Rows(20_032)
for start in range(0, 20_032, 64):
    rows.append(np.arange(start, start + 64), batch.clone())
assert rows.gather(torch.device("cpu")).sum() == 20_032 * 2048
print(peak() - before)
"""


@pytest.mark.parametrize(("script", "limit"), [
    (NEIGHBOURS, 180),      # One matrix of all distances is 256 MB.
    (ROWS, 290),            # The table is 164 MB, and 67 MB are on their way to it.
], ids=["precision-recall", "features"])
@pytest.mark.slow
def test_peak(script, limit):
    env = os.environ | {"THP_MEM_ALLOC_ENABLE": "0"}       # Whole pages of 2 MB would blur the peak.
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert 10 < float(done.stdout) < limit
