# SPDX-License-Identifier: Apache-2.0
"""Two processes give what one gives."""
import json

import pytest
import torch

from tests.closeness import approx
from tests.metrics import two_ranks
from tests.metrics.helpers import in_two_processes, one_thread

pytestmark = pytest.mark.numeric


def result(folder, num_processes):
    lines = (folder / "metric-fid.jsonl").read_text().splitlines()
    assert len(lines) == 2                          # Two evaluations, each written once.
    assert json.loads(lines[0])["num_gpus"] == num_processes
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, tiny_inception):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with one_thread():
        two_ranks.score(str(tmp_path / "one"), torch.device("cpu"))
    in_two_processes("tests.metrics.two_ranks", tmp_path / "two", STYLESAN_CACHE=str(tmp_path / "cache-two"))
    one, two = result(tmp_path / "one", 1), result(tmp_path / "two", 2)
    assert {"fid", "sfid", "adm_sfid50k@num=333", "adm_is50k@num=333"} < one["values"].keys()
    for key, value in one["values"].items():
        if "fid" in key:
            assert two["values"][key] == approx(value, rel=1e-9)     # Sums in another order.
        else:
            assert two["values"][key] == value
    assert one["num_read"] == [2 * 333]             # Each evaluation reads an image once, for all its metrics.
    assert sum(two["num_read"]) == 2 * 333          # No image twice, none left out.
    assert min(two["num_read"]) > 0
