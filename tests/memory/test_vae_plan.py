"""How a video passes through the VAE under a memory budget, and what happens when memory runs out after all."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

import frameloom
from frameloom.bench.vae import CONFIGS
from frameloom.config import memory_bytes
from frameloom.engine.vae import make_fast
from frameloom.errors import RequestError
from frameloom.memory.meter import peak_bytes
from frameloom.memory.vae import VaePlanner
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import REFERENCE, VaeChoices, prepare
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.ops.vae_rewrites import NORM_SILU_TILED
from frameloom.pipeline import stages
from frameloom.platform import allocator

SPEC = VaeSpec.from_config({"base_dim": 96, "z_dim": 16})  # Wan 2.1
LATENTS = (1, 16, 5, 60, 104)  # 17 frames of 480x832
CHOICES = VaeChoices(kernels={}, norm=NORM_SILU_TILED.name, channels_last=True)


def planner(budget: int | None, choices: VaeChoices = CHOICES) -> VaePlanner:
    return VaePlanner(spec=SPEC, dtype=torch.float32, choices=choices, device=torch.device("cpu"), budget_bytes=budget)


def test_the_meter_counts_what_lives_at_once() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1000, device="meta")
        b = a + 1
        del a
        return torch.cat([b, b * 2])

    with torch.inference_mode():
        assert peak_bytes(run) == 4000 + 4000 + 8000


def test_less_memory_means_narrower_bands_then_fewer_frames() -> None:
    shape = (1, 16, 5, 30, 52)
    plenty = next(planner(40_000_000_000).decode(shape))
    assert (plenty.steps, plenty.rows) == (2, 24)  # on a CPU bands are faster than whole pictures
    plan = planner(None)
    for rows, narrower in ((24, (2, 12)), (12, (2, 8)), (8, (1, 8))):  # the same bits, as long as it can be
        enough = plan.needed((1, 16, 30, 52), 4, dataclasses.replace(plenty, rows=rows))
        chosen = next(planner(enough - 1).decode(shape))
        assert (chosen.steps, chosen.rows) == narrower


@pytest.mark.parametrize("vae", ["2.1", "2.2", "tiny"])
@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize(("steps", "rows"), [(1, None), (4, None), (2, 8)])
def test_what_is_not_counted_is_never_more_than_was_assumed(vae: str, encode: bool, steps: int, rows: int) -> None:
    spec = VaeSpec.from_config(dict(CONFIGS[vae]))
    kernels = {"vae.conv_winograd": ("encoder.conv_in", "decoder.conv_in", "decoder.mid_block.resnets.0.conv1")}
    choices = dataclasses.replace(CHOICES, kernels={name: way for way, names in kernels.items() for name in names})
    plan = dataclasses.replace(planner(None, choices), spec=spec)
    for batch, height, width in ((1, 2, 2), (2, 7, 3), (1, 16, 16)):
        scale = spec.spatial_scale
        picture = (batch, 3, height * scale, width * scale) if encode else (batch, spec.z_dim, height, width)
        passage = Passage(steps=steps, rows=rows, channels_last=True)
        assert plan.needed(picture, 4, passage, encode=encode) < plan._at_most(
            passage, batch * height * width * scale**2
        )


def test_small_pictures_pass_whole() -> None:
    assert next(planner(40_000_000_000).decode((1, 16, 5, 8, 16))).rows is None


def test_a_plan_takes_less_than_half_of_what_whole_pictures_take() -> None:
    plan = planner(None)
    whole, chosen = Passage(steps=4, channels_last=True), Passage(steps=4, rows=16, channels_last=True)
    assert plan.needed((1, 16, 60, 104), 4, chosen) < plan.needed((1, 16, 60, 104), 4, whole) / 2


def test_a_budget_below_the_narrowest_band_says_how_much_is_needed() -> None:
    shape = (1, 16, 5, 8, 26)  # 64 rows of pixels: not so many bands to count
    with pytest.raises(RequestError, match=r"needs at least .* and the budget is 0.10 GB; allow (\d+) bytes") as error:
        planner(100_000_000).decode(shape)
    needed = int(str(error.value).split("allow ")[1].split()[0])
    chosen = next(planner(needed).decode(shape))
    assert (chosen.steps, chosen.rows) == (1, 8)


def test_without_bands_a_short_budget_is_refused() -> None:
    whole_only = dataclasses.replace(CHOICES, bands=False)
    with pytest.raises(RequestError, match="needs at least"):
        planner(4_500_000_000, whole_only).decode(LATENTS)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", [(1, 16, 5, 8, 16), (1, 16, 2, 1, 1), LATENTS])
def test_bands_and_chunks_that_were_asked_for_by_name_are_used_for_every_picture(device, shape) -> None:
    choices = dataclasses.replace(CHOICES, always_bands=True, always_chunks=True)
    plan = dataclasses.replace(planner(10**15, choices), device=torch.device(device))
    passages = [*plan.decode(shape), *plan.encode((1, 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4]))]
    assert all(passage.rows is not None and passage.rows < 8 * shape[3] for passage in passages)
    assert all(passage.steps > 1 or shape[2] == 2 for passage in passages)


def test_after_the_plan_come_halves_of_it() -> None:
    _, *rest = planner(40_000_000_000).decode(LATENTS)
    assert [(passage.steps, passage.rows) for passage in rest] == [(2, 8), (1, 8)]


@pytest.mark.parametrize(
    ("text", "expected"), [("auto", None), ("6GB", 6 * 10**9), ("1.5 g", 15 * 10**8), (123, 123), ("900M", 9 * 10**8)]
)
def test_amounts_of_memory(text: str | int, expected: int | None) -> None:
    assert memory_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "1.5", "1.5B", "\u0665\u0665\u0665", "-1", "0", "9" * 400, "6 TB", "much", "1e9", True, None]
)
def test_amounts_that_are_none(text: object) -> None:
    with pytest.raises(RequestError, match="write auto, or bytes"):
        memory_bytes(text)  # type: ignore[arg-type]


def small_vae() -> WanVAE:
    torch.manual_seed(0)
    config = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return WanVAE(VaeSpec.from_config(config)).eval()


def test_the_prediction_is_near_what_a_decode_allocates(monkeypatch) -> None:
    """The meter on the meta device against the same meter on real tensors, all of them made by torch."""
    monkeypatch.setattr(allocator, "_SMALL_BYTES", 1 << 40)
    vae = small_vae()
    spec = vae.spec
    choices = make_fast(vae, policy=Policy()).planner.choices
    plan = VaePlanner(spec=spec, dtype=torch.float32, choices=choices, device=torch.device("cpu"), budget_bytes=10**9)
    passage = next(plan.decode((1, 4, 3, 24, 24)))
    prepare(vae)
    with torch.inference_mode():
        z = torch.randn(1, 4, 3, 24, 24)
        real = peak_bytes(lambda: sum(1 for _ in vae.decode_stream(z, passage)))
    needed = plan.needed((1, 4, 24, 24), 2, passage)
    assert real <= needed <= 1.25 * real


def test_memory_does_not_grow_with_the_number_of_frames() -> None:
    vae = small_vae()
    peaks = []
    for latents in (5, 21):  # 17 and 81 frames
        z = torch.randn(1, 4, latents, 6, 6)
        streamed = stages.decode(vae, z, iter([Passage(steps=2, rows=3)]), lambda _: None)
        peaks.append(peak_bytes(lambda frames=streamed: sum(1 for _ in frames)) - z.nbytes)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def fails_first(vae: WanVAE, times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the second chunk of the first `times` attempts run out of memory; returns what was tried."""
    tried: list[str] = []
    plain = vae.decode_stream

    def stream(z: torch.Tensor, passage: Passage, **options):
        tried.append(str(passage))
        for number, chunk in enumerate(plain(z, passage, **options)):
            if number == 1 and len(tried) <= times:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            yield chunk

    monkeypatch.setattr(vae, "decode_stream", stream)
    return tried


def test_when_memory_runs_out_half_the_band_goes_on_from_there(monkeypatch, caplog) -> None:
    vae = small_vae()
    z = torch.randn(1, 4, 4, 6, 5)
    passages = [Passage(steps=2), Passage(rows=3), Passage(rows=2)]
    expected = np.concatenate(list(stages.decode(vae, z, iter(passages[:1]), lambda _: None)), axis=1)
    tried = fails_first(vae, 2, monkeypatch)
    counts: list[int] = []
    with caplog.at_level(logging.WARNING, "frameloom"):
        frames = np.concatenate(list(stages.decode(vae, z, iter(passages), counts.append)), axis=1)
    assert np.abs(frames.astype(int) - expected).max() <= 1
    assert tried == [str(passage) for passage in passages]
    assert counts == [1, 5, 9, 13]
    assert "memory ran out with 2 latent frames at a time" in caplog.text


def test_when_nothing_narrower_is_left_the_error_is_told(monkeypatch) -> None:
    vae = small_vae()
    fails_first(vae, 9, monkeypatch)
    with pytest.raises(RuntimeError, match="allocate memory"):
        list(stages.decode(vae, torch.randn(1, 4, 2, 4, 4), iter([Passage(), Passage(rows=1)]), lambda _: None))


def test_other_errors_are_not_tried_again(monkeypatch) -> None:
    vae = small_vae()
    tried = []

    def stream(z: torch.Tensor, passage: Passage, **_):
        tried.append(passage)
        raise RuntimeError("something else")
        yield

    monkeypatch.setattr(vae, "decode_stream", stream)
    with pytest.raises(RuntimeError, match="something else"):
        list(stages.decode(vae, torch.randn(1, 4, 2, 4, 4), iter([Passage(), Passage(rows=1)]), lambda _: None))
    assert len(tried) == 1


def test_the_engine_refuses_a_budget_before_it_denoises() -> None:
    with frameloom.load(vae_memory=1000) as engine:
        steps: list[object] = []
        with pytest.raises(RequestError, match="needs at least"):
            engine.generate("a red circle", steps=1, progress=steps.append)
        assert steps == []


def test_a_small_budget_decodes_the_same_frames() -> None:
    with frameloom.load() as engine:
        z = torch.randn(1, 8, 5, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = engine.decode(z)
    with frameloom.load(vae_memory=1) as engine, pytest.raises(RequestError, match="allow") as error:
        engine.decode(z)
    needed = int(str(error.value).split("allow ")[1].split()[0])
    with frameloom.load(vae_memory=needed) as engine:
        frames = engine.decode(z)
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_the_reference_passes_plainly() -> None:
    assert REFERENCE.passage == Passage(buffers=False)
