"""Conditions that tests of several folders share."""
import pytest
import torch

# Every test of a GPU carries this beside `pytest.mark.gpu`, so that all are skipped for one reason.
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
