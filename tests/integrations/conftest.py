"""Fixtures of the tests with Diffusers."""

from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import attention_backend


@pytest.fixture(autouse=True)
def one_attention_backend_at_a_time() -> Iterator[None]:
    """In Diffusers a backend that is set for a model becomes that of all: each test gives it back."""
    with attention_backend("native"):
        yield
