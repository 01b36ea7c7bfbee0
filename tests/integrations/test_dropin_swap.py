"""A module whose class is ours, and back: hooks put on before and after, copies, pickles, files, and its name."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook

from frameloom.integrations.diffusers.swap import held_by, is_swapped, plain_class, swap, unswap


class Counted:
    """Counts the calls that pass, and computes as the class below."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held_by(self).calls += 1
        return super().forward(*args, **kwargs)


class Counting:
    calls = 0
    is_released = False

    def release(self) -> None:
        self.is_released = True


@pytest.fixture
def dit() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    ).eval()  # fmt: skip


def compute(dit: Any) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 1, 4, 4, generator=noise), torch.randn(1, 3, 8, generator=noise)
    with torch.inference_mode():
        out: torch.Tensor = dit(latents, torch.tensor([3]), text, return_dict=False)[0]
    return out


def calls_of(dit: Any) -> int:
    """How often ours computes in a call."""
    held = held_by(dit)
    before = held.calls
    compute(dit)
    return int(held.calls - before)


class Doubling(AccelerateHook):
    """Doubles what comes out, which shows that it is there."""

    def post_forward(self, module: Any, output: Any) -> Any:
        return (output[0] * 2,)


class Tripling(ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return (output[0] * 3,)


def accelerates(dit: Any) -> Callable[[], None]:
    add_hook_to_module(dit, Doubling())
    return lambda: remove_hook_from_module(dit)


def diffusers(dit: Any) -> Callable[[], None]:
    registry = HookRegistry.check_if_exists_or_initialize(dit)
    registry.register_hook(Tripling(), "tripling")
    return lambda: registry.remove_hook("tripling")


KINDS = pytest.mark.parametrize(("attach", "factor"), [(accelerates, 2), (diffusers, 3)])


def test_a_swapped_module_is_what_it_was_and_computes_by_ours(dit: Any) -> None:
    plain, state, names = compute(dit), dit.state_dict(), [name for name, _ in dit.named_modules()]
    parameters = [id(parameter) for parameter in dit.parameters()]
    swap(dit, Counted, Counting())
    assert isinstance(dit, WanTransformer3DModel)
    assert type(dit).__name__ == "WanTransformer3DModel"
    assert type(dit).__module__ == WanTransformer3DModel.__module__
    assert plain_class(type(dit)) is WanTransformer3DModel
    assert [id(parameter) for parameter in dit.parameters()] == parameters
    assert [name for name, _ in dit.named_modules()] == names
    assert dit.state_dict().keys() == state.keys()
    assert calls_of(dit) == 1
    assert torch.equal(compute(dit), plain)


def test_restored_the_class_is_its_own_and_what_was_held_is_released_once(dit: Any) -> None:
    plain, before = compute(dit), set(vars(dit))
    held = Counting()
    swap(dit, Counted, held)
    assert unswap(dit)
    assert type(dit) is WanTransformer3DModel
    assert held.is_released
    assert set(vars(dit)) == before
    assert not unswap(dit)
    assert torch.equal(compute(dit), plain)


def test_taken_twice_it_raises_and_stays_taken(dit: Any) -> None:
    held = Counting()
    swap(dit, Counted, held)
    with pytest.raises(TypeError, match="taken already"):
        swap(dit, Counted, Counting())
    assert held_by(dit) is held


@KINDS
def test_hooks_put_on_before_run_around_ours_and_go_as_they_came(dit: Any, attach: Any, factor: int) -> None:
    plain = compute(dit)
    detach = attach(dit)
    swap(dit, Counted, Counting())
    assert calls_of(dit) == 1
    assert torch.equal(compute(dit), plain * factor)
    detach()
    assert calls_of(dit) == 1
    assert torch.equal(compute(dit), plain)
    unswap(dit)
    assert torch.equal(compute(dit), plain)


@KINDS
def test_hooks_that_outlive_ours_run_around_its_own(dit: Any, attach: Any, factor: int) -> None:
    plain = compute(dit)
    swap(dit, Counted, held := Counting())
    detach = attach(dit)
    assert calls_of(dit) == 1
    unswap(dit)
    before = held.calls
    assert torch.equal(compute(dit), plain * factor)
    assert held.calls == before
    detach()
    assert torch.equal(compute(dit), plain)
    assert not is_swapped(dit)


@KINDS
def test_hooks_put_on_before_and_kept_to_the_end(dit: Any, attach: Any, factor: int) -> None:
    plain = compute(dit)
    detach = attach(dit)
    swap(dit, Counted, held := Counting())
    unswap(dit)
    assert torch.equal(compute(dit), plain * factor)
    assert held.calls == 0
    detach()
    assert torch.equal(compute(dit), plain)


def test_a_copy_is_plain_and_computes_the_same(dit: Any) -> None:
    plain = compute(dit)
    swap(dit, Counted, Counting())
    twin = copy.deepcopy(dit)
    assert type(twin) is WanTransformer3DModel
    assert torch.equal(compute(twin), plain)
    assert calls_of(dit) == 1
    twin.proj_out.weight.data.zero_()
    assert torch.equal(compute(dit), plain)


def test_a_pickle_is_plain_and_computes_the_same(dit: Any) -> None:
    plain = compute(dit)
    swap(dit, Counted, Counting())
    torch.save(dit, file := io.BytesIO())
    assert b"frameloom" not in file.getvalue(), "it could not be read where Frameloom is not installed"
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert type(twin) is WanTransformer3DModel
    assert torch.equal(compute(twin), plain)


def test_what_is_saved_says_the_class_it_had(dit: Any, tmp_path: Any) -> None:
    plain = compute(dit)
    swap(dit, Counted, Counting())
    dit.save_pretrained(tmp_path)
    assert WanTransformer3DModel.load_config(tmp_path)["_class_name"] == "WanTransformer3DModel"
    assert torch.equal(compute(WanTransformer3DModel.from_pretrained(tmp_path).eval()), plain)


def test_moved_to_another_dtype_and_back_it_is_still_taken(dit: Any) -> None:
    swap(dit, Counted, Counting())
    assert dit.to(torch.float64).dtype == torch.float64
    assert is_swapped(dit.to(torch.float32))
    assert calls_of(dit) == 1


def test_two_modules_of_a_class_are_taken_for_themselves(dit: Any) -> None:
    other = copy.deepcopy(dit)
    swap(dit, Counted, Counting())
    assert not is_swapped(other)
    swap(other, Counted, Counting())
    assert type(other) is type(dit)
    unswap(dit)
    assert is_swapped(other)
    assert calls_of(other) == 1
