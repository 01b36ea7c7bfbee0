"""Prompts that come again: the very bits of the encoder, as long as nothing that they were made of has changed."""

import copy
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import pytest
import torch
from diffusers import WanPipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from frameloom.integrations.diffusers.accelerate import accelerate_pipeline, restore_pipeline
from frameloom.integrations.diffusers.prompts import MOST_BYTES, Prompts, take_text_encoder
from frameloom.integrations.diffusers.samples.catalogue import sample_of
from frameloom.integrations.diffusers.samples.sample import Scale
from frameloom.integrations.diffusers.swap import held_by, unswap
from frameloom.ops.registry import Policy
from frameloom.settings import LOGGER_NAME

KINDS = {UMT5EncoderModel: UMT5Config, T5EncoderModel: T5Config}
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])


def _encoder(kind: Any = UMT5EncoderModel) -> Any:
    torch.manual_seed(0)
    config = KINDS[kind](vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return kind(config).eval()


def _taken(kind: Any = UMT5EncoderModel) -> tuple[Any, Prompts]:
    encoder = _encoder(kind)
    entry = take_text_encoder("text_encoder", encoder, Policy(exactness="bitwise"))
    assert entry is not None
    assert entry.taken
    return encoder, held_by(encoder)


def _tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 40, (1, 8), generator=torch.Generator().manual_seed(seed))


def _counts(prompts: Prompts) -> tuple[int, int]:
    return prompts.hits, prompts.misses


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_prompt_that_comes_again_has_the_bits_it_had(kind: Any) -> None:
    plain = [_encoder(kind)(_tokens(seed), MASK).last_hidden_state for seed in (0, 1)]
    encoder, prompts = _taken(kind)
    for _ in range(2):
        for seed in (0, 1):
            output = encoder(_tokens(seed), MASK)
            assert torch.equal(output.last_hidden_state, plain[seed])
    assert _counts(prompts) == (2, 2)


@torch.no_grad()
def test_who_writes_to_an_output_writes_to_no_other() -> None:
    encoder, prompts = _taken()
    first = encoder(_tokens(0), MASK).last_hidden_state
    kept = first.clone()
    first.zero_()
    second = encoder(_tokens(0), MASK).last_hidden_state
    assert torch.equal(second, kept)
    second.zero_()
    assert torch.equal(encoder(_tokens(0), MASK).last_hidden_state, kept)
    assert _counts(prompts) == (2, 1)


@torch.no_grad()
def test_masks_options_and_kinds_of_output_are_told_apart() -> None:
    encoder, prompts = _taken()
    plain = _encoder()
    for asked in (
        {"attention_mask": MASK},
        {"attention_mask": torch.ones_like(MASK)},
        {"attention_mask": MASK, "return_dict": False},
        {"attention_mask": MASK, "output_hidden_states": True},
        {},
    ):
        for _ in range(2):
            ours, theirs = encoder(_tokens(0), **asked), plain(_tokens(0), **asked)
            assert type(ours) is type(theirs)
            for a, b in zip(_tensors(ours), _tensors(theirs), strict=True):
                assert torch.equal(a, b)
    assert _counts(prompts) == (5, 5)


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in (output.values() if hasattr(output, "values") else output) for t in _tensors(part)]


def _merge(encoder: Any) -> None:
    encoder.encoder.block[1].layer[0].SelfAttention.q.weight.data += 0.5  # as PEFT merges an adapter


def _all_columns_but_one(encoder: Any) -> None:
    encoder.encoder.block[0].layer[0].SelfAttention.v.weight.data[:, 1:] *= -5


def _write(encoder: Any) -> None:
    encoder.shared.weight[_tokens(0)[0, 0], 3] += 0.5


def _rewrite_a_word(encoder: Any) -> None:
    encoder.shared.weight.data[_tokens(0)[0, 3], 5] = 5.0  # one number, which the samples of a weight may pass by


def _replace(encoder: Any) -> None:
    encoder.encoder.final_layer_norm.weight = nn.Parameter(torch.full((16,), 2.0))


def _convert(encoder: Any) -> None:
    encoder.to(torch.bfloat16)


def _configure(encoder: Any) -> None:
    encoder.config.output_hidden_states = True


@pytest.mark.parametrize(
    "change", [_merge, _all_columns_but_one, _write, _rewrite_a_word, _replace, _convert, _configure]
)
@torch.no_grad()
def test_what_has_changed_is_computed_anew(change: Callable[[Any], None]) -> None:
    encoder, prompts = _taken()
    encoder(_tokens(0), MASK)
    change(encoder)
    plain = _encoder()
    change(plain)
    for _ in range(2):
        ours, theirs = encoder(_tokens(0), MASK), plain(_tokens(0), MASK)
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert _counts(prompts) == (1, 2)


_PLACES: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
PRECISIONS: dict[str, Callable[[], None]] = {
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "of a GPU": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "of a CPU": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "high, by the older interface": lambda: torch.set_float32_matmul_precision("high"),
    "medium, by the older interface": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.fixture
def precision_given_back() -> Iterator[None]:
    before = [place.fp32_precision for place in _PLACES]
    yield
    torch.set_float32_matmul_precision("highest")
    for place, precision in zip(_PLACES, before, strict=True):
        place.fp32_precision = precision
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("set_precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.usefixtures("precision_given_back")
@torch.no_grad()
def test_another_precision_of_products_is_another_prompt(set_precision: Callable[[], None]) -> None:
    encoder, prompts = _taken()
    encoder(_tokens(0), MASK)
    set_precision()
    for _ in range(2):
        ours = encoder(_tokens(0), MASK).last_hidden_state
        assert torch.equal(ours, _encoder()(_tokens(0), MASK).last_hidden_state)
    assert _counts(prompts) == (1, 2)


@torch.no_grad()
def test_a_hit_needs_no_weights_where_they_are_offloaded() -> None:
    encoder, prompts = _taken()
    _, hook = accelerate.cpu_offload_with_hook(encoder, execution_device="cpu")
    moved: list[str] = []
    before = hook.hook.pre_forward
    hook.hook.pre_forward = lambda *args, **kwargs: moved.append("in") or before(*args, **kwargs)
    first = encoder(_tokens(0), MASK).last_hidden_state
    hook.offload()
    for weight in encoder.parameters():
        weight.data = weight.data.clone()  # as it is when weights come from another device
    assert torch.equal(encoder(_tokens(0), MASK).last_hidden_state, first)
    assert moved == ["in"]
    assert _counts(prompts) == (1, 1)


def _offload_by_layer(encoder: Any) -> None:
    accelerate.cpu_offload(encoder, execution_device=torch.device("cpu"))


def _watch(encoder: Any) -> None:
    encoder.encoder.block[0].register_forward_hook(lambda *_: None)


def _train(encoder: Any) -> None:
    encoder.train()


def _adapt(encoder: Any) -> None:
    class Adapted(nn.Linear):
        pass

    attention = encoder.encoder.block[0].layer[0].SelfAttention
    attention.q.__class__ = Adapted


def _patch(encoder: Any) -> None:
    layer = encoder.encoder.final_layer_norm
    layer.forward = layer.forward


def _wrap_embedding(encoder: Any) -> None:
    encoder.set_input_embeddings(nn.Sequential(encoder.get_input_embeddings()))


REASONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "offloaded by layer": (_offload_by_layer, "elsewhere until they are used"),
    "hook": (_watch, "a hook is on its UMT5Block"),
    "training": (_train, "training mode"),
    "layer of another library": (_adapt, "it has a Adapted of test_dropin_text inside"),
    "embedding in a layer": (_wrap_embedding, "its words are embedded by a Sequential"),
    "patched": (_patch, "its UMT5LayerNorm has a forward of its own"),
}


@pytest.mark.parametrize(("change", "reason"), REASONS.values(), ids=REASONS)
@torch.no_grad()
def test_where_outputs_may_differ_nothing_is_remembered_and_the_log_says_why(
    change: Callable[[Any], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, prompts = _taken()
    change(encoder)
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        for _ in range(2):
            encoder(_tokens(0), MASK)
    assert _counts(prompts) == (0, 0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("prompts are not remembered: ")
    assert reason in caplog.messages[0]


def test_nothing_is_remembered_while_gradients_are_recorded_or_autocast_is_on() -> None:
    encoder, prompts = _taken()
    output = encoder(_tokens(0), MASK).last_hidden_state
    output.sum().backward()
    assert encoder.shared.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(_tokens(0), MASK)
    assert _counts(prompts) == (0, 0)
    assert prompts.held_bytes == 0


@torch.no_grad()
def test_nothing_is_remembered_while_a_graph_of_cuda_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, prompts = _taken()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    output = encoder(_tokens(0), MASK).last_hidden_state
    assert torch.equal(output, _encoder()(_tokens(0), MASK).last_hidden_state)
    assert _counts(prompts) == (0, 0)


@torch.no_grad()
def test_every_number_of_a_words_embedding_is_part_of_its_key() -> None:
    encoder, prompts = _taken()
    words = encoder.shared.weight.data
    for place in range(words.shape[1]):
        encoder(_tokens(0), MASK)
        words[_tokens(0)[0, 3], place] += 1
    assert _counts(prompts) == (0, words.shape[1])


@torch.no_grad()
def test_words_that_there_are_not_are_for_the_encoder_to_refuse() -> None:
    encoder, _ = _taken()
    with pytest.raises(IndexError, match="index out of range in self"):
        encoder(torch.tensor([[1, 40]]))


@torch.no_grad()
def test_embeddings_instead_of_tokens_are_computed() -> None:
    encoder, prompts = _taken()
    embedded = encoder.shared(_tokens(0))
    ours = encoder(inputs_embeds=embedded, attention_mask=MASK).last_hidden_state
    assert torch.equal(ours, _encoder()(inputs_embeds=embedded, attention_mask=MASK).last_hidden_state)
    assert prompts.held_bytes == 0


def test_the_oldest_is_forgotten_where_the_bound_is_reached() -> None:
    prompts = Prompts(most_bytes=3 * 400)
    for name in "abc":
        prompts.keep((name,), (torch.zeros(100),))
    assert prompts.find(("a",)) is not None
    prompts.keep(("d",), (torch.zeros(100),))
    assert prompts.held_bytes == 1200
    assert [prompts.find((name,)) is None for name in "abcd"] == [False, True, False, False]
    prompts.keep(("large",), (torch.zeros(301),))
    assert prompts.find(("large",)) is None
    assert prompts.held_bytes == 1200
    prompts.keep(("strange",), ([torch.zeros(1)],))
    assert prompts.find(("strange",)) is None
    prompts.release()
    assert prompts.held_bytes == 0


def test_several_threads_remember_and_forget_together() -> None:
    prompts = Prompts(most_bytes=100 * 4)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def use(seed: int) -> None:
        for i in range(300):
            key = ((seed + i) % 150,)
            if prompts.find(key) is None:
                prompts.keep(key, (torch.full((1,), float(key[0])),))

    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(use, range(0, 40, 10)))
    finally:
        sys.setswitchinterval(before)
    kept = {key: prompts.find((key,)) for key in range(150)}
    assert all(found is None or found[0].item() == key for key, found in kept.items())
    assert prompts.held_bytes == 4 * sum(found is not None for found in kept.values()) == 400


def test_a_copy_of_what_is_remembered_is_empty() -> None:
    prompts = Prompts(most_bytes=400)
    prompts.keep(("a",), (torch.zeros(100),))
    for copied in (copy.deepcopy(prompts), pickle.loads(pickle.dumps(prompts))):
        assert (copied.most_bytes, copied.held_bytes, copied.find(("a",))) == (400, 0, None)


@torch.no_grad()
def test_inference_mode_and_its_end() -> None:
    encoder, prompts = _taken()
    with torch.inference_mode():
        first = encoder(_tokens(0), MASK).last_hidden_state
    second = encoder(_tokens(0), MASK).last_hidden_state
    assert torch.equal(first, second)
    second.add_(1)
    assert not second.is_inference()
    assert _counts(prompts) == (1, 1)


def _pipe(text_encoder: Any) -> Any:
    return WanPipeline(tokenizer=None, text_encoder=text_encoder, vae=None, scheduler=None, transformer=None)


@torch.no_grad()
def test_a_pipeline_has_it_on_request_and_gives_it_back() -> None:
    pipe = _pipe(_encoder())
    options = {"vae": False, "transformer": False, "text_encoder": True}
    report = accelerate_pipeline(pipe, "bitwise", **options)
    assert f"{MOST_BYTES >> 20} MiB" in report["text_encoder"].what
    pipe.text_encoder(_tokens(0), MASK)
    prompts = held_by(pipe.text_encoder)
    assert prompts.held_bytes == 8 * 16 * 4
    restore_pipeline(pipe)
    assert type(pipe.text_encoder) is UMT5EncoderModel
    assert not unswap(pipe.text_encoder)
    assert prompts.held_bytes == 0


def test_a_pipeline_that_is_asked_again_encodes_nothing_again() -> None:
    scale = Scale(frames=5, steps=1)
    sample = sample_of("WanPipeline")
    pipe: Any = sample.build(scale)
    theirs = sample.run(pipe, scale)
    accelerate_pipeline(pipe, "bitwise", vae=False, transformer=False, text_encoder=True)
    for _ in range(2):
        assert torch.equal(sample.run(pipe, scale), theirs)
    assert _counts(held_by(pipe.text_encoder)) == (2, 2)  # the prompt and the negative one


def test_encoders_of_other_kinds_are_left_and_told() -> None:
    clip = CLIPTextModel(
        CLIPTextConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )

    class Mine(UMT5EncoderModel):  # type: ignore[misc]
        pass

    for encoder in (clip, Mine(_encoder().config)):
        pipe = _pipe(encoder)
        entry = accelerate_pipeline(pipe, "rounding", vae=False, transformer=False, text_encoder=True)["text_encoder"]
        assert not entry.taken
        assert "T5EncoderModel" in entry.what
        assert type(pipe.text_encoder) is type(encoder)
