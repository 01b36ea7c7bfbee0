import pytest
import torch

from frameloom.attention.core import BACKENDS, choose, sdpa
from frameloom.errors import RequestError


def naive_attention(q_BLHK, k_BSHK, v_BSHK):
    logits = torch.einsum("blhk,bshk->bhls", q_BLHK.double(), k_BSHK.double()) / q_BLHK.shape[-1] ** 0.5
    return torch.einsum("bhls,bshk->blhk", logits.softmax(-1), v_BSHK.double())


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "head_dim"), [(1, 7, 7, 3, 16), (3, 5, 11, 2, 10)])
def test_backend_equals_the_formula(backend, batch, queries, keys, heads, head_dim):
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, head_dim)
    k, v = torch.randn(2, batch, keys, heads, head_dim).unbind(0)
    out = BACKENDS[backend](q, k, v)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), naive_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_auto_and_explicit_choice_say_why():
    backend, reason = choose()
    assert backend is sdpa
    assert "every device" in reason
    backend, reason = choose("sdpa")
    assert backend is sdpa
    assert "asked for" in reason


def test_unknown_backend_is_an_error_that_names_what_exists():
    with pytest.raises(RequestError, match="'flash9' does not exist; use one of: auto, sdpa"):
        choose("flash9")
