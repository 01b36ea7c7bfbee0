"""Cosmos' conditioning latents: those that are used are what the pipeline makes, and no other frame is encoded."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    ConfigMixin,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2VideoToWorldPipeline,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from frameloom.engine.rewrites import policy_of
from frameloom.integrations.diffusers.accelerate import accelerate_pipeline, restore_pipeline
from frameloom.integrations.diffusers.conditioning import take_conditioning
from frameloom.integrations.diffusers.swap import is_swapped

FRAMES, HEIGHT, WIDTH = 13, 32, 48
LATENTS = 4
_WORDS = ("<unk>", "<eos>", "<|vision_start|>", "system", "user", "a", "ball")
_TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


class Unguarded(ModelMixin, ConfigMixin):
    """Stands where the safety checker does, which is not installed."""


def _vae(**config: Any) -> AutoencoderKLWan:
    torch.manual_seed(0)
    z = np.random.default_rng(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=z.normal(size=16).tolist(), latents_std=z.uniform(0.5, 2, size=16).tolist(), **config,
    ).eval()  # fmt: skip


def _cosmos3(kind: type = Cosmos3OmniPipeline) -> Any:
    vae = _vae()
    transformer = Cosmos3OmniTransformer(
        head_dim=12, hidden_size=24, intermediate_size=24, latent_channel=16, latent_patch_size=2,
        num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=1, patch_latent_dim=64, qk_norm_for_text=False,
        rope_axes_dim=[2, 2, 2], vocab_size=len(_WORDS), action_dim=12, action_gen=True,
    )  # fmt: skip
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", chat_template=_TEMPLATE
    )
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return kind(transformer.eval(), tokenizer, vae, scheduler, enable_safety_checker=False)


def _picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _video(frames: int) -> list[Image.Image]:
    return [_picture(seed) for seed in range(frames)]


def _action(mode: str, **how: Any) -> CosmosActionCondition:
    raw = torch.zeros(3, 9) if mode == "forward_dynamics" else None
    return CosmosActionCondition(
        mode=mode, chunk_size=8, domain_name="av", resolution_tier=256, raw_actions=raw, **how,
    )  # fmt: skip


SIZE: dict[str, Any] = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
ASKED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "text": (SIZE, []),
    "image": (SIZE | {"image": _picture(0)}, [1]),
    "image of a length that does not divide": (SIZE | {"image": _picture(0), "num_frames": 12}, [1]),
    "one image": (SIZE | {"num_frames": 1, "image": _picture(0)}, []),
    "video": (SIZE | {"video": _video(7)}, [5]),
    "short video": (SIZE | {"video": _video(2)}, [5]),
    "its end": (SIZE | {"video": _video(9), "condition_video_keep": "last"}, [5]),
    "its third frame": (SIZE | {"video": _video(13), "condition_frame_indexes_vision": [2]}, [9]),
    "all of it": (SIZE | {"video": _video(13), "condition_frame_indexes_vision": range(4)}, [13]),
    "latents": (SIZE | {"image": _picture(0), "latents": torch.ones(1, 16, LATENTS, 4, 6)}, []),
    "policy": ({"action": _action("policy", image=_picture(0))}, [1]),
    "forward": ({"action": _action("forward_dynamics", video=_video(2))}, [1]),
    "inverse": ({"action": _action("inverse_dynamics", video=_video(4))}, [9]),
}


def _prepare(pipe: Any, asked: dict[str, Any]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    made: tuple[Any, ...] = pipe.prepare_latents(**asked, generator=generator, device="cpu", dtype=torch.float32)
    return *made, torch.rand(1, generator=generator)


def _encoded(pipe: Any) -> list[int]:
    """How many frames each picture or video has that is encoded from here on."""

    def count(_: Any, args: Any) -> None:
        frames = args[0].shape[2]  # the first of a video comes alone
        if frames == 1:
            seen.append(1)
        else:
            seen[-1] += frames

    seen: list[int] = []
    pipe.vae.encoder.register_forward_pre_hook(count)
    return seen


def _same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
            assert torch.equal(a.signbit(), b.signbit())
        else:
            assert a == b


def _take(pipe: Any, exactness: str = "rounding") -> Any:
    """With the VAE as it is: these tests are about which frames it is asked for."""
    return take_conditioning(pipe, policy_of(exactness, ()))


@pytest.mark.parametrize(("asked", "frames"), ASKED.values(), ids=ASKED)
@torch.no_grad()
def test_cosmos3_encodes_the_frames_that_are_used_and_makes_the_same_latents(
    asked: dict[str, Any], frames: list[int]
) -> None:
    pipe = _cosmos3()
    theirs = _prepare(pipe, asked)
    assert _take(pipe).taken
    seen = _encoded(pipe)
    _same(_prepare(pipe, asked), theirs)
    assert seen == frames


@torch.no_grad()
def test_indexes_may_come_from_an_iterator() -> None:
    pipe = _cosmos3()
    asked = SIZE | {"video": _video(7)}
    theirs = _prepare(pipe, asked | {"condition_frame_indexes_vision": iter([0, 1])})
    _take(pipe)
    _same(_prepare(pipe, asked | {"condition_frame_indexes_vision": iter([0, 1])}), theirs)


@torch.no_grad()
def test_where_bits_have_to_stay_a_video_is_encoded_whole_or_not_at_all() -> None:
    pipe = _cosmos3()
    assert "no frame" in _take(pipe, "bitwise").what
    seen = _encoded(pipe)
    _prepare(pipe, ASKED["image"][0])
    _prepare(pipe, ASKED["text"][0])
    assert seen == [FRAMES]


@torch.no_grad()
def test_the_pipeline_makes_the_same_video_and_keeps_its_vae() -> None:
    pipe = _cosmos3()
    asked = SIZE | {"prompt": "a ball", "image": _picture(0), "num_inference_steps": 2, "output_type": "np"}
    theirs = pipe(**asked, generator=torch.Generator().manual_seed(0)).video
    vae, components = pipe.vae, pipe.components.keys()
    _take(pipe)
    for _ in range(2):
        ours = pipe(**asked, generator=torch.Generator().manual_seed(0)).video
        np.testing.assert_array_equal(ours, theirs)
    assert pipe.vae is vae
    assert pipe.components.keys() == components
    restore_pipeline(pipe)
    assert type(pipe) is Cosmos3OmniPipeline
    assert "_frameloom" not in vars(pipe)
    seen = _encoded(pipe)
    np.testing.assert_array_equal(pipe(**asked, generator=torch.Generator().manual_seed(0)).video, theirs)
    assert seen == [FRAMES]


def test_a_taken_pipeline_is_saved_and_copied_as_its_class(tmp_path: Any) -> None:
    pipe = _cosmos3()
    _take(pipe)
    assert isinstance(pipe, Cosmos3OmniPipeline)
    assert type(pipe).__name__ == "Cosmos3OmniPipeline"
    assert type(copy.copy(pipe)) is Cosmos3OmniPipeline
    pipe.save_config(tmp_path)
    assert '"_class_name": "Cosmos3OmniPipeline"' in (tmp_path / "model_index.json").read_text()


def _passes_on(name: str) -> Any:
    """A method of a subclass that calls its parent's."""
    return lambda self, *args, **kwargs: getattr(super(type(self), self), name)(*args, **kwargs)


@pytest.mark.parametrize("name", ["__call__", "prepare_latents", "_encode_video"])
def test_a_subclass_that_may_use_other_frames_is_left(name: str) -> None:
    mine = type("Mine", (Cosmos3OmniPipeline,), {name: _passes_on(name)})
    pipe = _cosmos3(mine)
    entry = _take(pipe)
    assert not entry.taken
    assert entry.what == f"Mine has its own {name}"
    assert type(pipe) is mine


def test_a_vae_with_another_rhythm_is_left() -> None:
    pipe = _cosmos3()
    pipe.vae = _vae(temperal_downsample=[False, False, True])
    entry = _take(pipe)
    assert not entry.taken
    assert "one latent frame of 4" in entry.what


class OwnVae(AutoencoderKLWan):  # type: ignore[misc]
    """As a VAE that looks ahead would be."""

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return super()._encode(x.flip(2))


@torch.no_grad()
def test_a_vae_that_is_exchanged_later_encodes_what_it_is_given() -> None:
    pipe, plain = _cosmos3(), _cosmos3()
    _take(pipe)
    for each in (pipe, plain):
        each.vae = OwnVae.from_config(each.vae.config).eval()
    pipe.vae.load_state_dict(plain.vae.state_dict())
    asked = SIZE | {"video": _video(7)}
    _same(_prepare(pipe, asked), _prepare(plain, asked))
    fresh = _cosmos3()
    fresh.vae = pipe.vae
    assert _take(fresh).what == "its VAE has its own _encode"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(AutoencoderKLWan, "_encode"), (Cosmos3OmniPipeline, "_encode_video"), (Cosmos3OmniPipeline, "prepare_latents")],
)
@torch.no_grad()
def test_classes_that_somebody_changed_encode_what_they_are_given(
    kind: Any, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, plain = _cosmos3(), _cosmos3()
    method = getattr(kind, name)

    @functools.wraps(method)
    def looks_ahead(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name != "prepare_latents":
            return method(self, args[0].flip(2))
        return *method(self, *args, **kwargs), self._encode_video(torch.ones(1, 3, FRAMES, HEIGHT, WIDTH))

    if when == "after":
        assert _take(pipe).taken
    monkeypatch.setattr(kind, name, looks_ahead)
    if when == "before":
        assert f"has its own {name}" in _take(pipe).what
    asked = SIZE | {"video": _video(7)}
    _same(_prepare(pipe, asked), _prepare(plain, asked))


def test_the_report_tells_of_the_pipeline_and_a_second_call_changes_nothing() -> None:
    pipe = _cosmos3()
    options = {"vae": True, "transformer": False, "text_encoder": False}
    first = accelerate_pipeline(pipe, "rounding", **options)
    assert "only the frames that are used" in first["pipeline"].what
    kind = type(pipe)
    assert accelerate_pipeline(pipe, "rounding", **options)["pipeline"].what == "it was taken before"
    assert type(pipe) is kind
    restore_pipeline(pipe)
    assert not is_swapped(pipe)
    assert not is_swapped(pipe.vae)


# Cosmos 2 and 2.5 draw a sample of what is encoded, and hand it on beside a mask.


def _cosmos2() -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return Cosmos2VideoToWorldPipeline(None, None, None, _vae(), scheduler, Unguarded())


def _predict() -> Any:
    return Cosmos2_5_PredictBasePipeline(None, None, None, _vae(), UniPCMultistepScheduler(), Unguarded())


def _transfer() -> Any:
    return Cosmos2_5_TransferPipeline(None, None, None, _vae(), UniPCMultistepScheduler(), None, Unguarded())


def _pixels(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(4)) * 2 - 1


OTHERS: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "2, a picture": (_cosmos2, {"video": _pixels(1), "num_frames": FRAMES}, [1, 1]),
    "2, a video": (_cosmos2, {"video": _pixels(6), "num_frames": FRAMES}, [5, 5]),
    "2, a whole video": (_cosmos2, {"video": _pixels(17), "num_frames": FRAMES}, [FRAMES, FRAMES]),
    "2.5, text": (_predict, {"video": None, "num_frames_in": 0, "num_frames_out": FRAMES}, []),
    "2.5, a picture": (_predict, {"video": _pixels(FRAMES), "num_frames_in": 1, "num_frames_out": FRAMES}, [1, 1]),
    "2.5, a video": (_predict, {"video": _pixels(FRAMES), "num_frames_in": 5, "num_frames_out": FRAMES}, [5, 5]),
    "transfer, at first": (
        _transfer,
        {"video": _pixels(FRAMES), "num_frames_in": FRAMES, "num_frames_out": FRAMES},
        [],
    ),
    "transfer, later": (
        _transfer,
        {"video": _pixels(FRAMES), "num_frames_in": FRAMES, "num_frames_out": FRAMES, "num_cond_latent_frames": 2},
        [5, 5],
    ),
}


@pytest.mark.parametrize(("make", "asked", "frames"), OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_cosmos2_uses_what_it_used_and_draws_as_many_numbers(
    make: Any, asked: dict[str, Any], frames: list[int]
) -> None:
    pipe = make()
    asked = asked | {"batch_size": 2, "num_channels_latents": 16, "height": HEIGHT, "width": WIDTH}
    theirs = _prepare(pipe, asked)
    assert _take(pipe).taken
    seen = _encoded(pipe)
    ours = _prepare(pipe, asked)
    assert seen == frames
    _same((ours[0], *ours[2:]), (theirs[0], *theirs[2:]))
    indicator = next(part for part in theirs[2:] if part is not None and part.shape[2] == LATENTS)[:, :1, :, :1, :1]
    assert torch.equal(indicator * ours[1], indicator * theirs[1])
    assert ours[1].isfinite().all()


def _all_frames(latent_shape: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, frames, height, width = latent_shape
    return torch.ones(batch, 1, frames, 1, 1), torch.ones(batch, 1, frames, height, width)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_with_a_condition_mask_of_its_own_a_video_is_encoded_whole(when: str) -> None:
    pipe, plain = _predict(), _predict()
    asked = OTHERS["2.5, a video"][1] | {
        "batch_size": 2, "num_channels_latents": 16, "height": HEIGHT, "width": WIDTH,
    }  # fmt: skip
    if when == "after":
        assert _take(pipe).taken
    for each in (pipe, plain):
        each.create_condition_mask = _all_frames
    if when == "before":
        assert _take(pipe).what == "Cosmos2_5_PredictBasePipeline has its own create_condition_mask"
    _same(_prepare(pipe, asked), _prepare(plain, asked))
