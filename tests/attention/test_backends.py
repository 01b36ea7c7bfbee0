"""Backends of other packages, by stand-in packages that compute attention as the real ones are documented to."""

import logging
import sys
import textwrap

import pytest
import torch
from test_attention import formula, tokens

from frameloom.attention.backend import HALF_PRECISIONS, Place
from frameloom.attention.core import BACKENDS, NAMES, Guarded, backends, choose, sdpa
from frameloom.engine.modules import set_attention
from frameloom.errors import InternalError, RequestError
from frameloom.models.vae_blocks import AttentionBlock
from frameloom.ops.registry import relative_error

# What each function is given and gives back, from the packages' own signatures. All but sdpa's stand-ins insist on
# half precision, as the kernels do, and tell layouts apart: heads and tokens may not be confused.
PREAMBLE = """
import torch
import torch.nn.functional as F

def attention(q, k, v, scale):
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] == v.shape[2:] and k.shape == v.shape
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = (x.float().transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, scale=scale).transpose(1, 2).to(q.dtype)
"""
FLASH = """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    assert dropout_p == 0 and causal is False
    return attention(q, k, v, softmax_scale)
"""
FLASH_HOPPER = """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None,
                    deterministic=False, sm_margin=0, return_attn_probs=False):
    assert causal is False and qv is None
    return attention(q, k, v, softmax_scale)
"""
FLASH_HOPPER_BETA = """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    return attention(q, k, v, softmax_scale), torch.zeros(q.shape[0], q.shape[2], q.shape[1])
"""
SAGE = """
def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not is_causal and not kwargs
    assert q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1, "Last dim of qkv must be contiguous."
    return attention(q, k, v, sm_scale)
"""
AITER = """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), bias=None,
                    alibi_slopes=None, deterministic=True, return_lse=False, return_attn_probs=False):
    assert dropout_p == 0 and causal is False and bias is None
    return attention(q, k, v, softmax_scale)
"""
NPU = """
def npu_fusion_attention(query, key, value, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None,
                         scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647):
    assert input_layout == "BSND" and head_num == query.shape[2] and keep_prob == 1.0
    out = attention(query, key, value, scale)
    return out, torch.zeros(1), torch.zeros(1), torch.zeros(0), 0, 0, 0
"""
STAND_INS = {
    "flash2": ("flash_attn", FLASH),
    "flash3": ("flash_attn_interface", FLASH_HOPPER),
    "sage": ("sageattention", SAGE),
    "aiter": ("aiter", AITER),
    "npu_fusion": ("torch_npu", NPU),
}
PLATFORM = {"flash2": "cuda", "flash3": "cuda", "sage": "cuda", "aiter": "rocm", "npu_fusion": "npu"}
HOPPER = {"platform": "cuda", "capability": (9, 0), "head_dim": 128, "dtype": torch.bfloat16}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Write a package of one file and put it where imports find it."""
    monkeypatch.syspath_prepend(tmp_path)
    for package, _ in STAND_INS.values():
        monkeypatch.delitem(sys.modules, package, raising=False)

    def write(package, code):
        monkeypatch.delitem(sys.modules, package, raising=False)
        (tmp_path / f"{package}.py").write_text(PREAMBLE + textwrap.dedent(code), encoding="utf-8")

    yield write
    for package, _ in STAND_INS.values():
        sys.modules.pop(package, None)


def chosen(name, **wishes):
    return choose(name, **({"platform": PLATFORM[name], "capability": (9, 0)} | wishes))


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", HALF_PRECISIONS)
def test_a_backend_hands_its_package_what_that_expects(name, dtype, install):
    install(*STAND_INS[name])
    attend, reason = chosen(name, dtype=dtype, head_dim=32)
    q, k, v = tokens(2, 7, 5, 3, 32, dtype)
    out = attend(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert relative_error(out, formula(q, k, v)) < 5e-3
    assert reason == f"{name}{' (lossy)' if name == 'sage' else ''}: asked for by name"


@pytest.mark.parametrize("name", STAND_INS)
def test_a_backend_takes_views_with_strides_of_any_kind(name, install):
    install(*STAND_INS[name])
    attend, _ = chosen(name)
    packed = torch.randn(2, 3, 16, 6, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = packed.permute(0, 3, 1, 4, 2).unbind(3)  # (2, 6, 3, 16): the head dimension is not innermost
    assert relative_error(attend(q, k, v), formula(q, k, v)) < 5e-3


def test_flash_attention_3_may_return_its_statistics_too(install):
    install("flash_attn_interface", FLASH_HOPPER_BETA)
    q, k, v = tokens(2, 7, 5, 3, 32, torch.bfloat16)
    assert relative_error(chosen("flash3")[0](q, k, v), formula(q, k, v)) < 5e-3


@pytest.mark.parametrize("name", STAND_INS)
def test_a_missing_package_is_an_error_with_the_way_to_get_it(name, install):
    hint = next(backend.hint for backend in BACKENDS if backend.name == name)
    with pytest.raises(RequestError, match=f"'{name}' cannot be used: {STAND_INS[name][0]} is not installed") as error:
        chosen(name)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('undefined symbol: _ZN3c10\\nsecond line')", r"cannot be loaded \(undefined symbol: _ZN3c10\)"),
        ("import a_package_that_is_nowhere", "cannot be loaded .*No module named"),
        ("version = 4", "installed but has no flash_attn_func"),
    ],
)
def test_a_broken_package_is_no_package(code, reason, install, caplog):
    install("flash_attn_interface", code)
    with pytest.raises(RequestError, match=reason):
        choose("flash3", **HOPPER)
    attend, why = choose(**HOPPER)
    assert attend is sdpa
    assert "not flash3: flash_attn_interface is installed but" in why


REFUSALS = [
    ("flash3", {"platform": "rocm"}, "it is for cuda, not rocm"),
    ("flash2", {"platform": "cpu"}, "it is for cuda and rocm, not cpu"),
    ("sage", {"platform": "npu"}, "it is for cuda, not npu"),
    ("aiter", {"platform": "cuda"}, "it is for rocm, not cuda"),
    ("npu_fusion", {"platform": "musa"}, "it is for npu, not musa"),
    ("flash3", {"capability": (8, 9)}, "needs compute capability 9.0 or higher, not 8.9"),
    ("flash3", {"capability": (10, 0)}, "needs compute capability below 10.0, not 10.0"),
    ("flash2", {"capability": (7, 5)}, "needs compute capability 8.0 or higher, not 7.5"),
    ("sage", {"capability": (7, 5)}, "needs compute capability 8.0 or higher"),
    ("flash2", {"dtype": torch.float32}, "computes float16 and bfloat16, not float32"),
    ("npu_fusion", {"dtype": torch.float32}, "computes float16 and bfloat16, not float32"),
    ("flash2", {"head_dim": 384}, "up to 256, not 384"),
    ("sage", {"head_dim": 129}, "up to 128, not 129"),
    ("npu_fusion", {"head_dim": 528}, "up to 512, not 528"),
    ("flash3", {"head_dim": 33}, "multiples of 8, not 33"),
    ("aiter", {"head_dim": 36}, "multiples of 8, not 36"),
    ("npu_fusion", {"head_dim": 24}, "multiples of 16, not 24"),
]


@pytest.mark.parametrize(("name", "wishes", "reason"), REFUSALS)
def test_what_a_backend_cannot_do_is_an_error_with_the_reason(name, wishes, reason, install):
    install(*STAND_INS[name])
    chosen(name)  # without the wish it can be had
    with pytest.raises(RequestError, match=f"'{name}' cannot be used: .*{reason}.*; use --attention auto or sdpa$"):
        chosen(name, **wishes)


def test_rocm_numbers_its_architectures_otherwise_and_is_not_held_to_cudas_numbers(install):
    install(*STAND_INS["flash2"])
    attend, _ = chosen("flash2", platform="rocm", capability=(6, 0))
    assert isinstance(attend, Guarded)


def test_flash_attention_2_takes_an_odd_head_dimension_which_it_pads_itself(install):
    install(*STAND_INS["flash2"])
    assert chosen("flash2", head_dim=33)[0] is not sdpa


def test_auto_takes_flash_attention_3_where_all_of_it_is_known_to_fit(install):
    for package, code in STAND_INS.values():
        install(package, code)
    attend, reason = choose(**HOPPER)
    assert isinstance(attend, Guarded)
    assert attend.name == "flash3"
    assert reason.startswith("flash3: 1.5 to 2 times")


@pytest.mark.parametrize(
    "wishes",
    [
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"head_dim": None},
        {"dtype": None},
        {"dtype": torch.float32},
        {"head_dim": 384},
        {"platform": "rocm"},
        {"platform": "npu"},
        {"platform": "musa"},
        {"platform": "xpu"},
        {"platform": "mps"},
        {"platform": "cpu"},
    ],
)
def test_auto_stays_with_sdpa_elsewhere_whatever_is_installed(wishes, install):
    for package, code in STAND_INS.values():
        install(package, code)
    attend, reason = choose(**(HOPPER | wishes))
    assert attend is sdpa
    assert reason.startswith("sdpa: runs on every device")


def test_nothing_lossy_is_ever_chosen_automatically():
    assert [b.name for b in BACKENDS if b.exactness == "lossy"] == ["sage"]
    assert all(backend.faster is None for backend in BACKENDS if backend.exactness == "lossy")


def test_the_device_of_this_machine_is_asked_when_no_capability_is_given(install):
    install(*STAND_INS["flash3"])
    attend, _ = choose(platform="cuda", head_dim=128, dtype=torch.bfloat16)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    assert (attend is sdpa) != hopper


def test_all_modules_of_a_network_get_one_backend_and_are_counted(install):
    install(*STAND_INS["flash2"])
    network = torch.nn.Sequential(AttentionBlock(8), AttentionBlock(8))
    assert set_attention(network, AttentionBlock, expected=2) == "sdpa: runs on every device"
    assert [block.attend for block in network] == [sdpa, sdpa]
    wishes = {"name": "flash2", "platform": "rocm", "head_dim": 8, "dtype": torch.bfloat16, "biased": True}
    assert "flash2" in set_attention(network, AttentionBlock, expected=2, **wishes)
    assert isinstance(network[0].attend, Guarded)
    assert network[0].attend is network[1].attend
    with pytest.raises(InternalError, match="2 attention modules where 3 were expected"):
        set_attention(network, AttentionBlock, expected=3)
    with pytest.raises(RequestError, match="up to 256, not 384"):
        set_attention(network, AttentionBlock, expected=2, **(wishes | {"head_dim": 384}))


def test_sdpa_by_name_and_by_default_say_why():
    assert choose() == (sdpa, "sdpa: runs on every device")
    assert choose("sdpa", platform="mps") == (sdpa, "sdpa: asked for by name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash4", "'flash4' does not exist; did you mean 'flash"),
        ("SDPA", "'SDPA' does not exist; "),
        ("sagee", "did you mean 'sage'?"),
        ("xyz", "'xyz' does not exist; known are auto, sdpa, flash3, flash2, aiter, npu_fusion, native, sage"),
    ],
)
def test_an_unknown_name_is_an_error_that_tells_the_nearest(name, message):
    with pytest.raises(RequestError) as error:
        choose(name)
    assert message in str(error.value)
    assert all(known in str(error.value) for known in NAMES)


def test_the_list_for_a_platform_tells_what_is_missing_and_how_to_get_it(install):
    install(*STAND_INS["flash2"])
    found = {entry.name: entry for entry in backends("rocm")}
    assert list(found) == list(NAMES[1:])
    assert found["sdpa"].reason_missing is None
    assert found["flash2"].reason_missing is None
    assert found["aiter"].reason_missing == "aiter is not installed"
    assert found["flash3"].reason_missing == "it is for cuda, not rocm"
    assert found["sage"].exactness == "lossy"
    assert {name for name, entry in found.items() if entry.hint} == {"aiter"}, "a hint is given where it would help"


def test_a_package_for_another_platform_is_not_loaded(install):
    install("torch_npu", "raise SystemError('this must not run')")
    assert backends("cuda")
    assert "torch_npu" not in sys.modules
    assert Place(platform="cuda").known is False


FAILING = "def flash_attn_func(q, k, v, **kwargs):\n    raise {error}\n"


def test_a_kernel_chosen_automatically_that_fails_makes_way_with_one_warning(install, caplog):
    install("flash_attn_interface", FAILING.format(error="RuntimeError('no kernel image\\nis available')"))
    attend, _ = choose(**HOPPER)
    q, k, v = tokens(2, 7, 5, 3, 32, torch.bfloat16)
    with caplog.at_level(logging.WARNING, logger="frameloom"):
        for _ in range(3):
            assert torch.equal(attend(q, k, v), sdpa(q, k, v))
    assert caplog.messages == ["attention: flash3 failed (no kernel image); sdpa takes over"]


def test_a_kernel_asked_for_by_name_that_fails_is_an_error_each_time(install):
    install("flash_attn_interface", FAILING.format(error="RuntimeError('no kernel image')"))
    attend, _ = choose("flash3", **HOPPER)
    q, k, v = tokens(2, 7, 5, 3, 32, torch.bfloat16)
    for _ in range(2):
        with pytest.raises(RequestError, match=r"'flash3' failed \(no kernel image\); use --attention auto or sdpa"):
            attend(q, k, v)


@pytest.mark.parametrize("name", ["auto", "flash3"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory')", torch.OutOfMemoryError),
        ("MemoryError('none left')", MemoryError),
        ("KeyboardInterrupt()", KeyboardInterrupt),
    ],
)
def test_memory_that_runs_out_and_the_users_interrupt_pass_through(name, error, kind, install, caplog):
    install("flash_attn_interface", FAILING.format(error=error))
    attend, _ = choose(name, **HOPPER)
    with pytest.raises(kind):
        attend(*tokens(1, 2, 2, 1, 8, torch.bfloat16))
    assert caplog.messages == []
    assert not attend.failed


@pytest.mark.parametrize("name", ["auto", "flash3"])
def test_calls_with_a_bias_go_to_sdpa_which_the_choice_says_once(name, install, caplog):
    install(*STAND_INS["flash3"])
    with caplog.at_level(logging.INFO, logger="frameloom"):
        attend, _ = choose(name, biased=True, **HOPPER)
    assert caplog.messages == ["attention: flash3 takes no bias on the keys; calls that bring one go to sdpa"]
    q, k, v = tokens(2, 7, 5, 3, 32, torch.bfloat16)
    bias = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attend(q, k, v, bias), sdpa(q, k, v, bias))
    assert relative_error(attend(q, k, v, None), formula(q, k, v)) < 5e-3
    assert len(caplog.messages) == 1


def test_a_bias_is_never_dropped_in_silence(install):
    install(*STAND_INS["flash3"])
    attend, _ = choose("flash3", **HOPPER)
    with pytest.raises(InternalError, match="'flash3' takes no bias; choose it with biased=True"):
        attend(*tokens(1, 2, 2, 1, 8, torch.bfloat16), torch.zeros(1, 2))
