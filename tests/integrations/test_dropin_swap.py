"""A module whose class is ours, and back: hooks put on before and after, copies, pickles, files, and its name."""

import copy
import functools
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

import frameloom
from frameloom.errors import RequestError
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


class Restored(Counted):
    """Somebody restores the module when its forward has begun, and what follows asks for what was held."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        unswap(self)  # type: ignore[arg-type]
        return super().forward(*args, **kwargs)


class Mistaken:
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("of its own")


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


def test_looked_up_by_its_class_it_is_what_it_was_and_what_is_put_on_top_is_not(dit: Any) -> None:
    swap(dit, Counted, Counting())
    taken: Any = type(dit)
    assert taken is not WanTransformer3DModel
    assert taken in (WanTransformer3DModel,)
    assert {WanTransformer3DModel: "known"}[taken] == {taken: "known"}[WanTransformer3DModel] == "known"
    assert taken != torch.nn.Module
    on_top: Any = type(taken.__name__, (taken,), {})
    assert on_top == on_top  # by the comparison that it has from ours
    assert on_top not in (taken, WanTransformer3DModel)
    assert WanTransformer3DModel not in {on_top: "another"}


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


def test_a_forward_that_was_kept_is_the_class_s_own_when_restored(dit: Any) -> None:
    plain = compute(dit)
    swap(dit, Counted, held := Counting())
    assert inspect.signature(type(dit).forward) == inspect.signature(Counted.forward)
    dit.forward = functools.partial(dit.forward)
    assert torch.equal(compute(dit), plain)
    unswap(dit)
    assert torch.equal(compute(dit), plain)
    assert held.calls == 1
    swap(dit, Counted, held)
    assert calls_of(dit) == 1


def test_restored_within_its_forward_it_computes_as_its_class(dit: Any) -> None:
    plain = compute(dit)
    swap(dit, Restored, Counting())
    assert torch.equal(compute(dit), plain)
    assert not is_swapped(dit)


def test_a_mistake_of_a_forward_that_is_taken_is_raised(dit: Any) -> None:
    swap(dit, Mistaken, Counting())
    with pytest.raises(KeyError, match="of its own"):
        compute(dit)


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


class Scaled(torch.nn.Module):
    """A parametrization: torch puts a class of its own on top of the module's."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


def test_a_class_on_top_of_ours_must_go_first_and_nothing_is_changed_before(dit: Any) -> None:
    plain = compute(dit)
    frameloom.accelerate({"transformer": dit})
    ours = {name: type(module) for name, module in dit.named_modules()}
    parametrize.register_parametrization(dit.blocks[0], "scale_shift_table", Scaled())
    with pytest.raises(
        RequestError, match=r"class Parametrized\w+ was put on top of it after it was accelerated; undo that first"
    ):
        frameloom.restore({"transformer": dit})
    assert {name: type(dit.get_submodule(name)) for name in ours if name != "blocks.0"} == {
        name: kind for name, kind in ours.items() if name != "blocks.0"
    }
    parametrize.remove_parametrizations(dit.blocks[0], "scale_shift_table", leave_parametrized=False)
    frameloom.restore({"transformer": dit})
    assert not any(map(is_swapped, dit.modules()))
    assert torch.equal(compute(dit), plain)


def test_a_part_with_a_class_on_top_stays_taken_in_a_copy_with_weights_of_its_own(dit: Any) -> None:
    frameloom.accelerate({"transformer": dit})
    parametrize.register_parametrization(dit.blocks[0], "scale_shift_table", Scaled())
    expected = compute(dit)
    twin = copy.deepcopy(dit)
    assert [name for name, module in twin.named_modules() if is_swapped(module)] == ["blocks.0"]
    assert held_by(twin.blocks[0]) is not held_by(dit.blocks[0])
    torch.testing.assert_close(compute(twin), expected)
    with torch.no_grad():
        twin.blocks[0].parametrizations["scale_shift_table"].original.zero_()
    assert not torch.allclose(compute(twin), expected, atol=1e-2)
    assert torch.equal(compute(dit), expected)
    # of the twin alone: torch lets a copy share the class, and takes the property away from both
    parametrize.remove_parametrizations(twin.blocks[0], "scale_shift_table")
    frameloom.restore({"transformer": twin})
    assert not any(map(is_swapped, twin.modules()))


def test_the_plain_class_is_found_below_what_was_put_on_top(dit: Any) -> None:
    swap(dit, Counted, Counting())
    parametrize.register_parametrization(dit, "scale_shift_table", Scaled())
    assert plain_class(type(dit)) is WanTransformer3DModel
    assert type(copy.deepcopy(dit)) is type(dit)
    with pytest.raises(RuntimeError, match="parametrized"):
        torch.save(dit, io.BytesIO())


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """A group of this process alone, as FSDP2 needs one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_that_comes_after_keeps_the_module_and_restore_says_so(dit: Any, alone: Any) -> None:
    plain = compute(dit)
    swap(dit, Counted, held := Counting())
    fully_shard(dit, mesh=alone)
    with pytest.raises(RequestError, match="a WanTransformer3DModel cannot be restored: the class FSDP"):
        frameloom.restore({"transformer": dit})
    assert not held.is_released
    with torch.no_grad():
        latents, text = torch.ones(1, 4, 1, 4, 4), torch.ones(1, 3, 8)
        dit(latents, torch.tensor([3]), text)
    assert held.calls == 1
    assert plain.shape


def test_what_fsdp_has_sharded_is_left(dit: Any, alone: Any) -> None:
    fully_shard(dit.blocks[0], mesh=alone)
    entry = frameloom.accelerate({"transformer": dit})["transformer"]
    assert not entry.taken
    assert entry.what == "its weights are sharded by FSDP2"
    assert not any(map(is_swapped, dit.modules()))


def offloads_whole(dit: Any) -> None:
    cpu_offload_with_hook(dit, execution_device="cpu")


def offloads_layers(dit: Any) -> None:
    cpu_offload(dit, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [offloads_whole, offloads_layers])
def test_a_copy_of_what_is_offloaded_computes_as_a_plain_one(dit: Any, offload: Callable[[Any], None]) -> None:
    plain = compute(dit)
    offload(dit)
    frameloom.accelerate({"transformer": dit}, "bitwise")
    twin = copy.deepcopy(dit)
    assert not any(map(is_swapped, twin.modules()))
    assert torch.equal(compute(twin), plain)
    assert torch.equal(compute(dit), plain)


@KINDS
def test_a_copy_keeps_its_hooks_and_gives_them_up_for_its_own_forward(dit: Any, attach: Any, factor: int) -> None:
    plain = compute(dit)
    attach(dit)
    swap(dit, Counted, Counting())
    twin = copy.deepcopy(dit)
    assert torch.equal(compute(twin), plain * factor)
    assert calls_of(dit) == 1, "the one that lives is still ours"
    if attach is accelerates:
        remove_hook_from_module(twin)
    else:
        twin._diffusers_hook.remove_hook("tripling")
    assert twin.forward.__func__ is WanTransformer3DModel.forward
    assert twin.forward.__self__ is twin
    assert torch.equal(compute(twin), plain)
