# SPDX-License-Identifier: Apache-2.0
"""Peak memory: nothing grows with the square of the number of images, and features are held once."""
import subprocess
import sys

import pytest

# What a fresh process needs on top of imports and of its arguments, in MB. Both measure ru_maxrss, which never falls,
# so each runs alone.
PRELUDE = """
import resource
import numpy as np, torch
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
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
def test_peak(script, limit):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit
