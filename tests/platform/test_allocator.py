"""Memory for tensors that come and go."""

import pytest
import torch

from frameloom.platform.allocator import empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5, 7), (1 << 10, 77), (3, 1 << 17)])
def test_memory_is_aligned_and_of_the_shape_that_was_asked_for(shape, dtype) -> None:
    x = empty(torch.zeros(1, dtype=dtype), *shape)
    assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
    assert x.data_ptr() % 64 == 0
    assert x.fill_(1).sum() == x.numel() or dtype == torch.bfloat16


def test_it_outlives_the_array_it_came_from_and_is_nobody_elses() -> None:
    like = torch.zeros(1)
    first, second = empty(like, 1 << 16).fill_(1), empty(like, 1 << 16).fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()


def test_elsewhere_it_is_what_torch_gives() -> None:
    x = empty(torch.zeros(1, device="meta"), 1 << 20, 2)
    assert x.is_meta
    assert x.shape == (1 << 20, 2)
