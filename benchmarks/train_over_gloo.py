# SPDX-License-Identifier: Apache-2.0
"""train.py whose processes talk gloo, also where they compute on GPUs: NCCL refuses two processes on one GPU.

Arguments are those of train.py. It is started by gpu_report.py, with the environment that torchrun would set.
"""
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    join = torch.distributed.init_process_group

    def join_over_gloo(_backend: str, device_id: Any = None, **options: Any) -> None:
        """Whatever was asked for; gloo is bound to no device."""
        join("gloo", **options)

    torch.distributed.init_process_group = join_over_gloo
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
