# SPDX-License-Identifier: Apache-2.0
"""How a batch may be cut into micro-batches: errors name the option and the remedy."""
from dnnlib import UserError


def split_batch(batch: int, batch_gpu: int | str | None, gpus: int) -> int:
    """Images per micro-batch, checked against the batch and the number of processes. 'auto' begins with all."""
    if batch % gpus:
        raise UserError(f"--batch={batch} is not divisible by --gpus={gpus}: take a multiple of {gpus}")
    if not isinstance(batch_gpu, int):
        return batch // gpus
    if batch % (gpus * batch_gpu):
        raise UserError(f"--batch={batch} is not divisible by --gpus={gpus} x --batch-gpu={batch_gpu}: take a multiple "
                        f"of {gpus * batch_gpu}, or another --batch-gpu")
    return batch_gpu


def check_diversity(diversity: float, batch_gpu: int) -> None:
    """The diversity term compares images two by two."""
    if diversity > 0 and batch_gpu % 2:
        raise UserError(f"--diversity={diversity:g} compares pairs of images, but a micro-batch has {batch_gpu}: take "
                        "an even --batch-gpu")


def check_ghost_batch(size: int, batch_gpu: int) -> None:
    """Ghost batches lie within micro-batches."""
    if size and (size < 2 or batch_gpu % size):
        raise UserError(f"--ghost-batch={size} must be at least 2 and divide the micro-batch of {batch_gpu}: take "
                        "another one, or another --batch-gpu")
