"""LTX-2 with its norm and rotation in one pass: what Diffusers computes, in all of its attentions, and its own back."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx2 import LTX2Attention, LTX2AudioVideoAttnProcessor
from peft import LoraConfig
from releases import skip_groups_without_an_accelerator

from frameloom.integrations.diffusers.accelerate import accelerate_pipeline, restore_pipeline
from frameloom.integrations.diffusers.ltx2 import Kernel, Turns, take_ltx2
from frameloom.integrations.diffusers.samples.neighbours import SAMPLES
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import held_by, is_swapped, unswap
from frameloom.ops.native import native
from frameloom.ops.registry import Policy, relative_error
from frameloom.ops.rope import norm_rotate
from frameloom.settings import LOGGER_NAME

FRAMES, HEIGHT, WIDTH, SOUNDS, WORDS, BATCH = 2, 3, 4, 5, 6, 2
TURNED = 2 * 4 * 2  # layers; video, sound, and each from the other; queries and keys
PLAIN = Policy()
OPTIONS = {"vae": False, "transformer": True, "text_encoder": False}


def _transformer(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=10,
        **{"rope_type": "split", "rope_double_precision": False} | config,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval() if dtype == torch.float32 else model.eval().to(dtype)


def _inputs(dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=draw).to(dtype)

    mask = torch.ones(BATCH, WORDS)
    mask[:, -2:] = 0
    return {
        "hidden_states": noise(FRAMES * HEIGHT * WIDTH, 4), "audio_hidden_states": noise(SOUNDS, 4),
        "encoder_hidden_states": noise(WORDS, 10), "audio_encoder_hidden_states": noise(WORDS, 10),
        "timestep": torch.tensor([500.0, 500.0]).to(dtype), "sigma": torch.tensor([500.0, 500.0]).to(dtype),
        "encoder_attention_mask": mask.to(dtype), "audio_encoder_attention_mask": mask.to(dtype),
        "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": 24.0, "audio_num_frames": SOUNDS,
        "return_dict": False, **more,
    }  # fmt: skip


def _take(model: Any) -> Counter[Any]:
    """What is counted: shapes of queries and keys that were normed and turned in one pass."""
    entry = take_ltx2("transformer", model, PLAIN)
    assert entry is not None
    assert entry.taken
    turns: Turns = held_by(model.transformer_blocks[0].attn1)
    kernel = turns.at(torch.device("cpu"), model.dtype) or Kernel(name="without a compiler", run=norm_rotate)
    seen: Counter[Any] = Counter()

    def counted(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen[tuple(x.shape[1:])] += 1
        return kernel.run(x, *args, **kwargs)

    turns._chosen[torch.device("cpu"), model.dtype] = replace(kernel, run=counted)
    return seen


def _same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 3e-6


NEWER = {
    "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True,
    "perturbed_attn": True,
}  # fmt: skip
STG = {"spatio_temporal_guidance_blocks": [0]}
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "LTX-2": ({}, {}, TURNED),
    "positions in float64": ({"rope_double_precision": True}, {}, TURNED),
    "LTX-2.3": (NEWER, {}, TURNED),
    "one block perturbed": (NEWER, STG, TURNED - 4),
    "one sample perturbed": (NEWER, STG | {"perturbation_mask": torch.tensor([0.0, 1.0])}, TURNED),
    "modalities apart": ({}, {"isolate_modalities": True}, TURNED // 2),
    "masked tokens": ({}, {"video_self_attention_mask": torch.ones(BATCH, 24, 24).tril()}, TURNED),
}


@pytest.mark.parametrize(("config", "asked", "turned"), ASKED.values(), ids=ASKED)
@torch.no_grad()
def test_all_streams_are_turned_in_one_pass_and_nothing_else_is_changed(
    config: dict[str, Any], asked: dict[str, Any], turned: int
) -> None:
    model = _transformer(**config)
    theirs = model(**_inputs(**asked))
    weights = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    seen = _take(model)
    _same(model(**_inputs(**asked)), theirs)
    assert seen.total() == turned
    for module in model.modules():
        unswap(module)
    assert not any(map(is_swapped, model.modules()))
    assert {type(block.attn1) for block in model.transformer_blocks} == {LTX2Attention}
    for a, b in zip(model(**_inputs(**asked)), theirs, strict=True):
        assert torch.equal(a, b)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == weights[name][0]
        assert torch.equal(value, weights[name][1])


@torch.no_grad()
def test_video_and_sound_have_tables_of_their_own() -> None:
    model = _transformer()
    seen = _take(model)
    model(**_inputs())
    video, sound = FRAMES * HEIGHT * WIDTH, SOUNDS
    assert seen == {(video, 24): 4, (sound, 16): 4 + 4, (video, 16): 4}


@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_diffusers_is() -> None:
    exact = _transformer(torch.bfloat16).float()(**{k: _wide(v) for k, v in _inputs(torch.bfloat16).items()})
    model = _transformer(torch.bfloat16)
    theirs = model(**_inputs(torch.bfloat16))
    seen = _take(model)
    ours = model(**_inputs(torch.bfloat16))
    assert seen.total() == TURNED
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, c) <= 1.1 * relative_error(b, c)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def test_a_processor_that_somebody_set_computes(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(LTX2AudioVideoAttnProcessor):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().__call__(*args, **kwargs)

    model, plain = _transformer(), _transformer()
    seen = _take(model)
    for changed in (model, plain):
        changed.set_attn_processor(Mine())
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        for a, b in zip(model(**_inputs()), plain(**_inputs()), strict=True):
            assert torch.equal(a, b)
    assert not seen
    assert caplog.messages == ["LTX2Attention computes as Diffusers has it: its processor is Mine"]


@torch.no_grad()
def test_processors_and_backends_stay_those_of_the_module() -> None:
    model = _transformer()
    processors = dict(model.attn_processors)
    seen = _take(model)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    model.set_attention_backend("_native_math")
    plain = _transformer()
    plain.set_attention_backend("_native_math")
    _same(model(**_inputs()), plain(**_inputs()))
    assert seen.total() == TURNED
    model.reset_attention_backend()


def test_gradients_are_those_of_diffusers() -> None:
    model, plain = _transformer(), _transformer()
    seen = _take(model)
    for trained in (model, plain):
        trained(**_inputs())[0].square().sum().backward()
    assert not seen
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("late", [False, True], ids=["adapter first", "taken first"])
@torch.no_grad()
def test_adapters_of_the_projections_come_and_go(late: bool) -> None:
    model, plain = _transformer(), _transformer()
    without = plain(**_inputs())
    seen = _take(model) if late else Counter()
    for adapted in (model, plain):
        torch.manual_seed(2)
        adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    seen = seen if late else _take(model)
    with_adapter = plain(**_inputs())
    assert relative_error(with_adapter[0], without[0]) > 1e-3
    _same(model(**_inputs()), with_adapter)
    assert seen.total() == TURNED
    model.fuse_lora()
    _same(model(**_inputs()), with_adapter)
    model.unfuse_lora()
    model.delete_adapters("default")
    _same(model(**_inputs()), without)
    assert seen.total() == 3 * TURNED


def _offload_groups(model: Any) -> None:
    skip_groups_without_an_accelerator()
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def _offload_layers(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("late", [False, True], ids=["offloaded first", "taken first"])
@pytest.mark.parametrize("offload", [_offload_groups, _offload_layers])
@torch.no_grad()
def test_norms_that_are_offloaded_by_themselves_are_called(offload: Callable[[Any], None], late: bool) -> None:
    model = _transformer()
    theirs = model(**_inputs())
    if late:
        seen = _take(model)
        offload(model)
    else:
        offload(model)
        entry = take_ltx2("transformer", model, PLAIN)
        assert entry is not None
        assert entry.taken
        seen = Counter()
    for a, b in zip(model(**_inputs()), theirs, strict=True):
        assert torch.equal(a, b)
    assert not seen


@torch.no_grad()
def test_what_is_traced_is_the_code_of_diffusers() -> None:
    model, plain = _transformer(), _transformer()
    seen = _take(model)
    torch._dynamo.reset()
    for compiled in (model, plain):
        compiled.transformer_blocks[0].compile(backend="eager", fullgraph=True)
    _same(model(**_inputs()), plain(**_inputs()))
    assert seen.total() == TURNED // 2  # of the block that is not compiled
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of Diffusers' own norms under autocast
@torch.no_grad()
def test_autocast_and_half_precision_angles_are_diffusers_own() -> None:
    model, plain = _transformer(), _transformer()
    seen = _take(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(model(**_inputs()), plain(**_inputs()), strict=True):
            assert torch.equal(a, b)
    x = torch.randn(1, 3, 24)
    angles = torch.randn(1, 2, 3, 6).bfloat16()
    table = (angles.cos(), angles.sin())
    attention, known = model.transformer_blocks[0].attn1, plain.transformer_blocks[0].attn1
    assert torch.equal(attention(x, query_rotary_emb=table), known(x, query_rotary_emb=table))
    assert not seen


def test_what_cannot_be_taken_is_left_and_told() -> None:
    interleaved = take_ltx2("transformer", _transformer(rope_type="interleaved"), PLAIN)
    assert interleaved is not None
    assert not interleaved.taken
    assert "interleaved" in interleaved.what
    model = _transformer()
    exact = take_ltx2("transformer", model, Policy(exactness="bitwise"))
    assert exact is not None
    assert not exact.taken
    assert "bitwise was asked for" in exact.what
    assert not any(map(is_swapped, model.modules()))
    empty = take_ltx2("transformer", _transformer().to("meta"), PLAIN)
    assert empty is not None
    assert not empty.taken
    assert "meta device" in empty.what
    assert take_ltx2("vae", torch.nn.Linear(2, 2), PLAIN) is None


class Wrapper(torch.nn.Module):
    """A norm in a layer of somebody's own, which shows nothing of it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.inner(x)
        return normed


@pytest.mark.parametrize("late", [False, True], ids=["wrapped first", "taken first"])
@pytest.mark.parametrize("name", ["norm_q", "norm_k"])
@torch.no_grad()
def test_a_norm_that_is_wrapped_is_called(name: str, late: bool) -> None:
    model, plain = _transformer(), _transformer()
    seen = _take(model) if late else Counter()
    for attention in (wrapped.transformer_blocks[1].attn1 for wrapped in (model, plain)):
        setattr(attention, name, Wrapper(getattr(attention, name)))
    seen = seen if late else _take(model)
    _same(model(**_inputs()), plain(**_inputs()))
    assert seen.total() == TURNED - 2


@torch.no_grad()
def test_without_a_kernel_it_is_diffusers_own() -> None:
    model, plain = _transformer().double(), _transformer().double()
    entry = take_ltx2("transformer", model, PLAIN)
    assert entry is not None
    assert entry.what.endswith("where there is a kernel")
    for a, b in zip(model(**_inputs(torch.float64)), plain(**_inputs(torch.float64)), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_the_pipeline_is_taken_told_of_and_given_back() -> None:
    sample, scale = next(s for s in SAMPLES if s.pipeline == "LTX2Pipeline"), Scale(frames=5, steps=1)
    pipe: Any = sample.build(scale)
    theirs = sample.run(pipe, scale)
    report = accelerate_pipeline(pipe, "rounding", **OPTIONS)
    how = "by dit.norm_rotate_native" if native("dit").library else "where there is a kernel"
    assert report["transformer"].what == f"norm and rotation of 12 attentions in one pass, {how}"
    assert report["connectors"].taken
    assert (sample.run(pipe, scale) - theirs).abs().max() <= 1 / 255
    assert accelerate_pipeline(pipe, "rounding", **OPTIONS)["transformer"].what == "it was taken before"
    restore_pipeline(pipe)
    assert not any(map(is_swapped, (*pipe.transformer.modules(), *pipe.connectors.modules())))
