"""`frameloom plan` and what `generate` foresees: from descriptions alone, for machines that are here or not."""

import json
import re
import shutil
from time import sleep

import pytest
import torch
from PIL import Image

import frameloom
from frameloom.engine import plan as planning
from frameloom.engine.machine import machine_of
from frameloom.engine.rates import Book, sheet_rates
from frameloom.errors import RequestError
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.platform.specs import SPECS, spec_of
from frameloom.platform.tuning import Foreseen, Tuner
from frameloom.settings import cache_folder
from frameloom.types import EngineConfig
from frameloom.weights.published import NAMES, published

SMALL = ["--width", "64", "--height", "32", "--frames", "5", "--steps", "2"]


@pytest.fixture(scope="module")
def on_a_small_card():
    return frameloom.plan(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", device="4060ti 16gb", host_memory="32GB", width=832, height=480
    )


def test_every_published_model_is_known_by_its_name_and_its_repository():
    assert published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").name == published("wan2.1-t2v-1.3b").name
    assert published("somebody/else") is None
    assert len(NAMES) == 10


def test_published_shapes_are_those_of_the_released_weights():
    parts = published("wan2.1-t2v-1.3b").components
    assert parts["transformer"].num_parameters == 1_418_996_800
    assert parts["text_encoder"].num_parameters == 5_680_910_336
    assert parts["vae"].num_parameters == 126_892_531


def test_two_experts_are_listed_twice():
    checkpoint = published("wan2.2-t2v-a14b")
    both = [checkpoint.components[name].num_parameters for name in ("transformer", "transformer_2")]
    assert both[0] == both[1] == 14_288_491_584
    assert checkpoint.boundary_ratio == 0.875


def test_the_stages_of_a_plan_are_those_of_a_run(on_a_small_card):
    assert [stage.stage for stage in on_a_small_card.stages] == ["text", "denoise", "decode", "encode"]
    assert all(stage.device_bytes > 0 and stage.seconds >= 0 for stage in on_a_small_card.stages)


def test_what_does_not_fit_whole_gives_way_to_the_text_encoder_first(on_a_small_card):
    plan = on_a_small_card
    assert plan.fits
    assert plan.arranged.device_bytes <= plan.memory_bytes == spec_of("4060ti 16gb").memory_bytes
    assert {choice.what for choice in plan.choices} == {"weights", "dtype", "guidance", "VAE", "parallel"}
    assert all(choice.reason for choice in plan.choices)


def test_every_kind_of_checkpoint_can_be_planned(checkpoint_of):
    size = {"width": 64, "height": 64, "num_frames": 5, "memory": "6GB"}
    for kind in ("image", "vace, two experts", "per-token timesteps"):
        plan = frameloom.plan(checkpoint_of(kind), **size)
        assert plan.fits, kind
        assert ("image" in {stage.stage for stage in plan.stages}) is (kind != "per-token timesteps")


def test_an_image_decides_the_size_as_it_does_for_a_video(checkpoint_of, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    plan = frameloom.plan(checkpoint_of("image"), image=str(tmp_path / "wide.png"), num_frames=5, height=32)
    assert plan.request.startswith("5 frames of 64x32")


def test_more_memory_keeps_everything_resident():
    roomy = frameloom.plan("wan2.1-t2v-1.3b", device="H100", width=832, height=480)
    assert roomy.arranged.layout.is_resident
    assert roomy.cheaper is not None
    assert roomy.cheaper.device_bytes < roomy.arranged.device_bytes


def test_several_devices_are_faster_than_one(on_a_small_card):
    four = frameloom.plan("wan2.1-t2v-1.3b", device="4060ti 16gb", gpus=4, width=832, height=480)
    alone, shared = ({stage.stage: stage.seconds for stage in plan.stages} for plan in (on_a_small_card, four))
    assert shared["denoise"] < alone["denoise"] / 2
    assert "4 x" in four.device


def test_a_device_without_bfloat16_computes_in_float32():
    blueprint = planning._drawn(published("wan2.1-t2v-1.3b"), machine_of("T4"), frameloom.EngineConfig())
    assert str(blueprint.dtype) == "torch.float32"
    assert "no bfloat16" in blueprint.why_dtype


def test_devices_answer_to_the_names_people_give_them():
    assert spec_of("rtx 4090") is spec_of("4090") is spec_of("NVIDIA RTX-4090")
    assert all(spec_of(spec.name) is spec for spec in SPECS)
    with pytest.raises(RequestError, match="did you mean 'H100'"):
        spec_of("H10O")


def test_what_is_foreseen_is_not_kept_as_if_it_had_been_measured(tmp_path):
    here = torch.device("cpu")
    foreseen = Foreseen(here, tmp_path)
    assert foreseen.best("a layer", ("plain", "packed"), dict) == "packed"
    foreseen.note("a rate", 2)
    foreseen.save()
    measured = Tuner(here, tmp_path)
    assert measured.number("a rate") == 2.0
    assert measured.number("another") is None
    assert (
        measured.best("a layer", ("plain", "packed"), lambda: {"plain": int, "packed": lambda: sleep(0.01)}) == "plain"
    )
    measured.save()
    assert Foreseen(here, tmp_path).best("a layer", ("plain", "packed"), dict) == "plain"


def test_the_command_prints_stages_choices_and_what_takes_less(run):
    code, out, _ = run("plan", *SMALL)
    assert code == 0
    for word in ("text", "denoise", "decode", "encode", "together", "weights: all weights resident", "dtype:", "VAE:"):
        assert word in out, (word, out)


def test_the_command_gives_a_record(run, checkpoint_of):
    code, out, _ = run("plan", "--model", checkpoint_of("two experts"), "--json", *SMALL, "--memory", "4GB")
    record = json.loads(out)
    assert code == 0
    assert record["memory_bytes"] == 4 * 10**9
    assert [stage["stage"] for stage in record["arranged"]["stages"]] == ["text", "denoise", "decode", "encode"]
    assert record["fits"]
    assert record["refusal"] is None


def test_what_fits_nowhere_is_told_with_what_to_do(run):
    code, out, _ = run("plan", *SMALL, "--memory", "1MB")
    assert code == 0
    assert "it does not fit: 5 frames of 64x32, 2 steps" in out
    assert "no size of video fits" in out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--device", "warp drive"], "nothing is known of a device"),
        (["--gpus", "0"], "0 devices"),
        (["--gpus", "100000"], "100000 devices cannot be planned; use 1 to 256"),
        (["wan2.1-i2v-14b"], "one of Wan2.1-T2V-1.3B"),
        (["--memory", "much"], "a memory of 'much'"),
        (["--width", "60"], "width 60"),
        (["one", "--model", "two"], "two models"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(run, options, word):
    code, out, err = run("plan", *options)
    assert (code, out) == (2, "")
    assert word in err
    assert len(err.splitlines()) == 1


def test_generate_refuses_what_cannot_fit_and_names_what_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr("frameloom.engine.machine.free_memory_bytes", lambda device: -(10**9))
    code, out, err = run("generate", "a red circle", "-o", tmp_path / "a.mp4")
    assert (code, out) == (2, "")
    sentence = err.splitlines()[-1]
    assert "17 frames of 64x64, 25 steps" in sentence
    assert "need about" in sentence
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nothing_measured(tmp_path_factory, monkeypatch):
    """A cache folder that has the compiled kernels and no run's rates: those of other sizes would be mixed in."""
    folder = tmp_path_factory.mktemp("cache") / "copy"
    shutil.copytree(cache_folder(), folder, ignore=shutil.ignore_patterns("choices-*"))
    monkeypatch.setenv("FRAMELOOM_CACHE", str(folder))


@pytest.mark.usefixtures("nothing_measured")
def test_generate_tells_what_was_foreseen_and_learns_from_the_run(run, tmp_path):
    options = ("generate", "a red circle", "-o", tmp_path / "a.mp4", "--json", "--steps", "2")
    before = json.loads(run(*options)[1])
    after = json.loads(run(*options)[1])
    assert before["foreseen"]["seconds"].keys() == {"text", "denoise", "decode", "encode"}
    assert "earlier runs" in after["foreseen"]["rates"]
    assert after["foreseen"]["seconds"]["decode"] == pytest.approx(before["seconds"]["decode"])
    assert after["foreseen"]["peak_memory_bytes"] > 10**8


def test_windows_are_planned_as_they_are_denoised():
    whole, cut = (frameloom.plan(num_frames=321, windows=windows) for windows in (None, True))
    long, short = ({stage.stage: stage for stage in plan.stages} for plan in (whole, cut))
    assert short["denoise"].device_bytes < long["denoise"].device_bytes
    assert short["decode"].seconds == long["decode"].seconds
    twice = frameloom.plan(num_frames=641, windows=True).stages[1]
    assert twice.seconds == pytest.approx(2 * short["denoise"].seconds, rel=0.1)
    assert cut.request.startswith("321 frames in windows of 17 of 64x64")


def test_what_is_asked_to_be_streamed_is_planned_so(run):
    code, out, _ = run("plan", *SMALL, "--residence", "transformer=streamed")
    assert code == 0
    assert "weights: text encoder resident, transformer streamed" in out


def test_generate_gives_way_where_resident_weights_do_not_fit(run, tmp_path):
    words = ("generate", "a red circle", *SMALL, "-o", tmp_path / "a.mp4")
    run(*words)  # so that the process has all that it ever takes
    request = {"width": 64, "height": 32, "num_frames": 5, "steps": 2}
    ways = ("auto", "text=streamed,transformer=streamed")
    plans = [frameloom.plan(config=EngineConfig(residence=way), **request) for way in ways]
    roomy, narrow = (plan.arranged.device_bytes for plan in plans)
    assert roomy - narrow > 20e6
    code, out, _ = run(*words, "--memory", str((roomy + narrow) // 2))
    assert code == 0
    assert re.search(r"text encoder streamed, transformer \w+: the first arrangement that fits", out)


def test_runs_teach_how_fast_work_of_their_size_is(tmp_path):
    book = Book(
        tuner=Tuner(torch.device("cpu"), tmp_path), dit=TransformerSpec(), dtype=torch.float32, vae=VaeSpec(),
        vae_dtype=torch.float32, text={},
    )  # fmt: skip
    guessed = sheet_rates(spec_of("T4"), torch.float32, torch.float32)
    assert book.corrected(guessed, {"decode": 2.0**30}) is guessed
    for power, rate in ((30, 1e9), (34, 16e9)):
        (key, _), *_ = book.lessons(guessed, {"decode": 2.0**power}).values()
        book.tuner.note(key, rate)
    rates = [book.corrected(guessed, {"decode": 2.0**power}).decode for power in (20, 30, 32, 34, 50)]
    assert rates == pytest.approx([1e9, 1e9, 4e9, 16e9, 16e9])
    assert book.corrected(guessed, {"decode": 2.0**30}).products == guessed.products


def test_a_plan_for_which_the_host_is_too_small_says_so():
    plan = frameloom.plan("wan2.1-t2v-1.3b", device="H100", host_memory="1GB", width=832, height=480)
    assert not plan.fits
    weights = next(choice for choice in plan.choices if choice.what == "weights")
    assert re.search(r"this one takes [\d.]+ GB of the host's 1\.00 GB", weights.reason)
    assert plan.refusal.endswith("no size of video takes less of the host: allow more host memory")
