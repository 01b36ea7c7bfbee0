"""What `frameloom.accelerate` and `restore` are given: pipelines, components, what is neither, and Diffusers itself."""

import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention
from diffusers.modular_pipelines import WanModularPipeline
from tiny_transformers import TINY

import frameloom
from frameloom.errors import RequestError
from frameloom.integrations.diffusers.report import Entry, Report
from frameloom.integrations.diffusers.samples.catalogue import SAMPLES, sample_of
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import is_swapped

SCALE = Scale()
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


class Unknown(DiffusionPipeline):
    """A pipeline of which nothing is known."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)


def unknown() -> Unknown:
    return Unknown(AutoencoderKL(block_out_channels=(32,), latent_channels=4))


@pytest.fixture
def pipe() -> Any:
    return sample_of("WanPipeline (2.1)").build(SCALE)


@pytest.mark.parametrize("asked", [None, "WanPipeline", 3, torch.nn.Linear(1, 1), DiffusionPipeline])
def test_what_is_no_pipeline_is_refused_in_one_sentence(asked: Any) -> None:
    for call in (frameloom.accelerate, frameloom.restore):
        with pytest.raises(
            RequestError, match="is no pipeline; give a pipeline of Diffusers, or components"
        ) as refusal:
            call(asked)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 200


def test_a_pipeline_of_which_nothing_is_known_stays_as_it_was() -> None:
    pipe = unknown()
    state = dict(vars(pipe.vae))
    with pytest.raises(RequestError, match="Unknown has no vae or transformer that can be taken over and is as it was"):
        frameloom.accelerate(pipe)
    assert type(pipe) is Unknown
    assert type(pipe.vae) is AutoencoderKL
    assert vars(pipe.vae) == state
    assert not any(is_swapped(module) for module in pipe.vae.modules())


@pytest.mark.parametrize("asked", ["roundig", "lossy"])
def test_an_exactness_that_is_not_to_be_had_is_refused_before_anything_is_taken(pipe: Any, asked: str) -> None:
    with pytest.raises(RequestError, match=f"'{asked}' is unknown in a pipeline; use one of bitwise, rounding$"):
        frameloom.accelerate(pipe, asked)
    assert not is_swapped(pipe.vae)


def test_nothing_asked_for_is_refused(pipe: Any) -> None:
    with pytest.raises(RequestError, match="nothing is to be taken over; let one of vae"):
        frameloom.accelerate(pipe, vae=False, transformer=False)


@pytest.mark.parametrize("option", ["vae", "transformer", "text_encoder"])
def test_a_choice_that_is_neither_true_nor_false_is_refused(pipe: Any, option: str) -> None:
    with pytest.raises(RequestError, match=f"{option} is 'no'; use True or False"):
        frameloom.accelerate(pipe, **{option: "no"})
    assert not is_swapped(pipe.vae)


def test_components_that_have_no_names_are_refused(pipe: Any) -> None:
    for call in (frameloom.accelerate, frameloom.restore):
        with pytest.raises(RequestError, match="components are given by their names, such as"):
            call({5: pipe.vae})
    assert not is_swapped(pipe.vae)


@pytest.mark.parametrize("asked", [{}, {"vae": None}])
def test_where_nothing_is_given_it_says_so(asked: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="none of the components given is a network: there is nothing to take over"):
        frameloom.accelerate(asked)
    frameloom.restore(asked)


def test_components_of_which_none_is_known_are_told_as_such() -> None:
    with pytest.raises(RequestError, match="what is given has no vae or transformer that can be taken over"):
        frameloom.accelerate({"vae": unknown().vae})


def test_the_second_time_says_so_and_changes_nothing(pipe: Any) -> None:
    first = frameloom.accelerate(pipe)
    kinds = {name: type(part) for name, part in pipe.components.items()}
    made = SAMPLES[0].run(pipe, SCALE)
    second = frameloom.accelerate(pipe)
    assert first["vae"].taken
    assert second["vae"].what == "it was taken before"
    assert {name: type(part) for name, part in pipe.components.items()} == kinds
    assert torch.equal(SAMPLES[0].run(pipe, SCALE), made)


def test_restored_twice_and_never_taken_it_is_as_it_was(pipe: Any) -> None:
    kinds = {name: type(part) for name, part in pipe.components.items()}
    frameloom.restore(pipe)
    frameloom.accelerate(pipe)
    frameloom.restore(pipe)
    frameloom.restore(pipe)
    assert {name: type(part) for name, part in pipe.components.items()} == kinds
    assert not any(is_swapped(module) for module in (*pipe.vae.modules(), *pipe.transformer.modules()))


def test_after_an_error_what_was_taken_is_given_back() -> None:
    before, later, broken = TINY["wan"].make(), TINY["wan"].make(), LTX2Attention(24, heads=2, dim_head=12)
    del broken.rope_type
    frameloom.accelerate({"before": before})
    with pytest.raises(AttributeError, match="rope_type"):
        frameloom.accelerate({"before": before, "later": later, "broken": broken})
    assert not any(map(is_swapped, later.modules()))
    assert all(map(is_swapped, before.blocks))


def test_components_by_name_are_taken_without_a_pipeline(pipe: Any) -> None:
    report = frameloom.accelerate({"vae": pipe.vae, "scheduler": pipe.scheduler})
    assert [entry.component for entry in report.taken] == ["vae"]
    assert is_swapped(pipe.vae)
    assert not is_swapped(pipe.transformer)
    frameloom.restore({"vae": pipe.vae})
    assert not is_swapped(pipe.vae)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_components_of_a_modular_pipeline_are_taken(pipe: Any) -> None:
    modular = WanModularPipeline()
    modular.update_components(vae=pipe.vae, transformer=pipe.transformer)
    report = frameloom.accelerate(modular)
    assert report["vae"].taken
    assert is_swapped(modular.vae)
    frameloom.restore(modular)
    assert not is_swapped(modular.vae)


@pytest.mark.parametrize("version", ["0.39.2", "0.9", None])
def test_diffusers_that_is_missing_or_too_old_is_named_with_what_to_install(monkeypatch: Any, version: Any) -> None:
    def told(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return str(version)

    for name in [name for name in sys.modules if name.startswith("frameloom.integrations.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(metadata, "version", told)
    expected = f"Diffusers {version} is too old" if version else "needs Diffusers, which is not installed"
    with pytest.raises(RequestError, match=expected) as refusal:
        frameloom.accelerate(object())
    assert "pip install 'frameloom[diffusers]'" in str(refusal.value)
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert extras["diffusers"] == ["diffusers>=0.40,<0.43"]


REASON = ", ".join(["its weights are quantized"] * 8)
ENTRIES = (
    Entry(component="transformer", kind="WanTransformer3DModel", taken=False, what=REASON),
    Entry(component="vae", kind="AutoencoderKLWan", taken=True, what="decoded here", extra_bytes=2_463_000_000),
)


@pytest.mark.parametrize(("columns", "widest"), [("0", 100), ("130", 130), ("80", 80)])
def test_long_reasons_are_wrapped_below_each_other_as_wide_as_the_terminal(
    monkeypatch: Any, columns: str, widest: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = str(Report(ENTRIES)).splitlines()
    column = lines[0].index("how, or why not")
    assert widest - 15 < max(map(len, lines)) <= widest
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    told = " ".join(line[column:] for line in lines[1:])
    assert told == f"{REASON} decoded here; holds up to 2.46 GB beside its weights"


@pytest.mark.parametrize("columns", ["60", "20"])
def test_in_a_narrow_terminal_reasons_are_below_what_they_are_of(monkeypatch: Any, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = str(Report(ENTRIES)).splitlines()
    assert max(map(len, lines)) <= 60
    start = lines.index("transformer  WanTransformer3DModel  left")
    assert lines[start + 1].startswith("    its weights are quantized, ")
    assert lines[-2:] == [
        "vae          AutoencoderKLWan       taken",
        "    decoded here; holds up to 2.46 GB beside its weights",
    ]
