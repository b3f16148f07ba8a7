"""Pieces on threads of their own."""
import pytest
import torch

from torch_utils.side_by_side import side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def look(piece):
    return torch.get_num_threads(), torch.is_grad_enabled(), piece * 2


def test_order_threads_and_gradients(two_threads):
    assert side_by_side(look, list(range(9))) == [(1, False, 2 * i) for i in range(9)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


def test_a_single_piece_has_all_threads(two_threads):
    assert side_by_side(look, [3]) == [(2, False, 6)]


def test_errors_come_through(two_threads):
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda x: 1 // x, [1, 0, 2])
    assert torch.get_num_threads() == 2
