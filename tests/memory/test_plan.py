"""The arithmetic of plans: what is held where, which arrangement is taken, and what would take less."""

from dataclasses import replace

import pytest
import torch

from frameloom.config import residences
from frameloom.memory.lane import PINNED_BYTES
from frameloom.memory.layout import Layout, Weights, held_in, layouts, pinned_bytes
from frameloom.memory.plan import Arranged, Plan, StagePlan, first_that_fits, next_cheaper, smaller_sizes
from frameloom.memory.residency import Footprint
from frameloom.memory.vae import VaePlanner
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import VaeChoices
from frameloom.models.vae_state import Passage
from frameloom.types import Residence, SizeRules

RESIDENT, MOVED, STREAMED = Residence
TEXT = Weights(
    name="text_encoder", footprint=Footprint(stays=20, units=(40,) * 20, slots=2, tables=180), stages=("text",)
)
EXPERT = Footprint(stays=1000, units=(100,) * 40, slots=2)
HIGH = Weights(name="transformer", footprint=EXPERT, stages=("denoise",))
LOW = Weights(name="transformer_2", footprint=EXPERT, stages=("denoise",))
VAE = Weights(name="vae", footprint=Footprint(stays=300), stages=("image", "decode"))
ALL = (TEXT, HIGH, LOW, VAE)
RULES = SizeRules(width_multiple=16, height_multiple=16, temporal=4, reason="VAE 8 x patch 2")


def arranged(device: int, host: int = 0) -> Arranged:
    stage = StagePlan(stage="denoise", device_bytes=device, host_bytes=host, seconds=1.0)
    return Arranged(layout=Layout(), batched=False, passage="whole", stages=(stage,))


def test_resident_weights_are_there_in_every_stage() -> None:
    assert {held_in(stage, ALL, Layout()) for stage in ("text", "denoise", "decode", "encode")} == {11_300}


def test_a_streamed_text_encoder_leaves_what_is_outside_its_blocks_and_its_table() -> None:
    layout = Layout(text=STREAMED)
    assert held_in("text", ALL, layout) == 10_300 + 20 + 2 * 40
    assert held_in("denoise", ALL, layout) == 10_300 + 20


def test_experts_that_are_moved_in_share_a_place() -> None:
    layout = Layout(text=STREAMED, transformer=MOVED)
    assert held_in("denoise", ALL, layout) == 20 + 300 + 5000 + 1000  # one whole, of the other what is not in blocks
    assert held_in("decode", ALL, layout) == 20 + 300 + 2 * 1000


def test_streamed_experts_share_two_blocks() -> None:
    layout = Layout(text=STREAMED, transformer=STREAMED)
    assert held_in("denoise", ALL, layout) == 20 + 300 + 2 * 1000 + 2 * 100
    assert held_in("decode", ALL, layout) == 20 + 300 + 2 * 1000


def test_a_network_with_blocks_beside_has_three_at_a_time() -> None:
    vace = replace(HIGH, footprint=replace(EXPERT, slots=3))
    layout = Layout(transformer=STREAMED)
    assert held_in("denoise", [vace], layout) == 1000 + 3 * 100


def test_the_host_pins_two_pieces_for_each_way() -> None:
    one = Layout(text=STREAMED)
    assert pinned_bytes(Layout()) == 0
    assert pinned_bytes(replace(one, transformer=MOVED)) == 2 * pinned_bytes(one) == 2 * PINNED_BYTES


def test_every_layout_holds_less_than_the_one_before_while_denoising() -> None:
    held = [held_in("denoise", ALL, layout) for layout in layouts(2, {})]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4
    assert len(list(layouts(1, {}))) == 3  # nothing to exchange with


def test_what_is_asked_for_stays_and_the_rest_gives_way() -> None:
    assert list(layouts(2, {"text": MOVED})) == [
        Layout(text=MOVED, transformer=where) for where in (RESIDENT, MOVED, STREAMED)
    ]
    assert list(layouts(1, {"text": MOVED, "transformer": STREAMED})) == [Layout(text=MOVED, transformer=STREAMED)]


def test_a_layout_can_be_asked_for_as_it_says() -> None:
    for layout in layouts(2, {}):
        assert Layout(**residences(layout.asked)) == layout


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
