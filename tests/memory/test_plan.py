"""The arithmetic of plans: what is held where, which arrangement is taken, and what would take less."""

import pytest
import torch

from frameloom.memory.plan import (
    Arranged,
    Layout,
    Plan,
    StagePlan,
    Weights,
    first_that_fits,
    held_in,
    host_bytes,
    layouts,
    next_cheaper,
    smaller_sizes,
)
from frameloom.memory.vae import VaePlanner
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import VaeChoices
from frameloom.models.vae_state import Passage
from frameloom.types import Residence, SizeRules

RESIDENT, MOVED, STREAMED = Residence
TEXT = Weights(name="text_encoder", size_bytes=1000, block_bytes=40, blocks_bytes=800, stages=("text",))
HIGH = Weights(name="transformer", size_bytes=5000, block_bytes=100, blocks_bytes=4000, stages=("denoise",))
LOW = Weights(name="transformer_2", size_bytes=5000, block_bytes=100, blocks_bytes=4000, stages=("denoise",))
VAE = Weights(name="vae", size_bytes=300, block_bytes=0, blocks_bytes=0, stages=("image", "decode"))
ALL = (TEXT, HIGH, LOW, VAE)
RULES = SizeRules(width_multiple=16, height_multiple=16, temporal=4, reason="VAE 8 x patch 2")


def arranged(device: int, host: int = 0, *, mapped: int = 0, layout: Layout | None = None) -> Arranged:
    stage = StagePlan(stage="denoise", device_bytes=device, host_bytes=host, seconds=1.0)
    layout = layout or Layout(text=RESIDENT, transformer=RESIDENT)
    return Arranged(layout=layout, batched=False, passage="whole", stages=(stage,), mapped_bytes=mapped)


def test_resident_weights_are_there_in_every_stage() -> None:
    layout = Layout(text=RESIDENT, transformer=RESIDENT)
    assert {held_in(stage, ALL, layout) for stage in ("text", "denoise", "decode", "encode")} == {11_300}


def test_a_streamed_text_encoder_leaves_what_is_outside_its_blocks() -> None:
    layout = Layout(text=STREAMED, transformer=RESIDENT)
    assert held_in("text", ALL, layout) == 10_300 + 200 + 2 * 40
    assert held_in("denoise", ALL, layout) == 10_300 + 200


def test_experts_that_are_moved_in_share_a_place() -> None:
    layout = Layout(text=STREAMED, transformer=MOVED)
    assert held_in("denoise", ALL, layout) == 200 + 300 + 5000 + 1000  # one whole, of the other what is not in blocks


def test_streamed_transformers_have_two_blocks_at_a_time() -> None:
    layout = Layout(text=STREAMED, transformer=STREAMED)
    assert held_in("denoise", ALL, layout) == 200 + 300 + 2 * 1000 + 2 * 100
    assert held_in("decode", ALL, layout) == 200 + 300 + 2 * 1000


def test_the_host_pins_the_buffers_of_the_largest_streamed_blocks() -> None:
    assert host_bytes(ALL, Layout(text=RESIDENT, transformer=RESIDENT)) == 0
    assert host_bytes(ALL, Layout(text=STREAMED, transformer=RESIDENT)) == 80
    assert host_bytes(ALL, Layout(text=STREAMED, transformer=STREAMED)) == 200


def test_every_layout_holds_less_than_the_one_before_while_denoising() -> None:
    held = [held_in("denoise", ALL, layout) for layout in layouts(2)]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4
    assert len(list(layouts(1))) == 3  # nothing to exchange with


def test_the_first_that_fits_is_taken_and_the_rest_is_not_looked_at() -> None:
    candidates = iter([arranged(100), arranged(60), arranged(59), arranged(30)])
    chosen, fits = first_that_fits(candidates, 70, 0)
    assert (chosen.device_bytes, fits) == (60, True)
    cheaper = next_cheaper(candidates, chosen)
    assert cheaper is not None
    assert cheaper.device_bytes == 30  # 59 is hardly less


def test_of_none_that_fits_the_least_is_told() -> None:
    chosen, fits = first_that_fits([arranged(100), arranged(60), arranged(80)], 50, 0)
    assert (chosen.device_bytes, fits) == (60, False)


def test_mapped_weights_do_not_keep_a_request_from_running() -> None:
    assert first_that_fits([arranged(100, mapped=60)], 50, 0)[1]
    assert not first_that_fits([arranged(100, mapped=40)], 50, 0)[1]


def test_the_host_counts_as_well() -> None:
    assert not first_that_fits([arranged(10, host=30)], 50, 20)[1]


def test_smaller_sizes_can_be_computed_and_come_nearest_first() -> None:
    sizes = list(smaller_sizes((832, 480, 81), RULES))
    assert sizes[0] == (832, 480, 61)
    assert all(w % 16 == 0 and h % 16 == 0 and n % 4 == 1 for w, h, n in sizes)
    assert all((w, h, n) != (832, 480, 81) and w <= 832 and n <= 81 for w, h, n in sizes)


def test_a_refusal_says_what_is_needed_what_there_is_and_what_fits() -> None:
    plan = Plan(
        model="wan", request="81 frames of 832x480, 50 steps", device="T4", memory_bytes=10**9,
        host_memory_bytes=10**9, arranged=arranged(2 * 10**9), choices=(), cheaper=None, fits=False,
        remedy="the nearest that fits is 41 frames of 416x240",
    )  # fmt: skip
    assert plan.refusal == (
        "81 frames of 832x480, 50 steps with 'wan' need about 2.00 GB of memory, and there are 1.00 GB; "
        "the nearest that fits is 41 frames of 416x240"
    )
    assert plan.record()["refusal"] == plan.refusal


@pytest.fixture
def vae_planner() -> VaePlanner:
    choices = VaeChoices(kernels={}, norm=None, channels_last=True)
    spec = VaeSpec(base_dim=8)
    return VaePlanner(spec=spec, dtype=torch.float32, choices=choices, device=torch.device("cpu"))


def test_no_more_frames_are_counted_than_there_are(vae_planner: VaePlanner) -> None:
    picture = (1, 16, 8, 8)
    two, four = (vae_planner.counted(picture, 2, Passage(steps=steps, channels_last=True)) for steps in (2, 4))
    assert two == four
    assert four < vae_planner.counted(picture, 4, Passage(steps=4, channels_last=True))


def test_a_kernel_that_keeps_weights_at_points_takes_more(vae_planner: VaePlanner) -> None:
    plain = vae_planner.held_bytes(encodes=True)
    weights = sum(4 * parameter.numel() for parameter in vae_planner._twin.parameters())
    assert plain == weights
    assert vae_planner.held_bytes(encodes=False) == plain  # the encoder keeps its weights until it is used
