"""The encoders against the Diffusers pipelines, on small random networks."""

import html
import json
import re
import shutil
import sys

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from frameloom.errors import CheckpointError, RequestError
from frameloom.models.clip import ImageEncoder, build_image_encoder, image_encoder_key, load_image_processor
from frameloom.models.encoders import (
    TIED,
    TextEncoder,
    build_text_encoder,
    clean_prompt,
    text_encoder_keeps_fp32,
)
from frameloom.models.tokenizer import build_tokenizer, load_tokenizer, write_tokenizer
from frameloom.models.umt5 import position_buckets
from frameloom.weights.load import load_module

UMT5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
UMT5 |= {"feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1}
CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP |= {"image_size": 28, "patch_size": 14, "projection_dim": 8, "hidden_act": "gelu"}
LETTERS = "abcdefghijklmnopqrstuvwxyz&<>;,.é0123456789"
PROMPTS = [
    "a red ball rolls  down\n the hill.",
    "",
    "caf&amp;eacute; &lt;b&gt; &amp;amp; \t x",
    "cafÃ© by the sea",
    "word " * 400,  # 2 tokens and more each: beyond 512
    "   ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """text_encoder and tokenizer as the libraries save them."""
    folder = tmp_path_factory.mktemp("wan")
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [(letter, -3.0) for letter in LETTERS]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**UMT5))
    for parameter in model.parameters():  # the library starts norms at one and biases near zero: make all of them count
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder / "text_encoder")
    return folder


def reference(folder, dtype=torch.float32):
    return WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        vae=None,
        scheduler=None,
    )


def ours(folder, dtype=None):
    model = build_text_encoder(json.loads((folder / "text_encoder" / "config.json").read_text()))
    files = [folder / "text_encoder" / "model.safetensors"]
    load_module(model, files, dtype=dtype, keep=text_encoder_keeps_fp32(dtype), tied=TIED)
    return TextEncoder(model=model, tokenizer=load_tokenizer(folder / "tokenizer"))


def relative_error(x, wanted):
    return ((x.double() - wanted.double()).norm() / wanted.double().norm()).item()


# --- text ---


@pytest.fixture(scope="module")
def pair(folder):
    """The reference and ours, in float32."""
    return reference(folder), ours(folder)


@pytest.mark.parametrize("length", [512, 226, 7])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[1:2], PROMPTS[4:5], PROMPTS[:4], PROMPTS])
def test_embeds_prompts_as_the_reference_does(pair, prompts, length):
    with torch.no_grad():  # as WanPipeline.__call__ does: gradients choose another attention kernel
        wanted, negative = pair[0].encode_prompt(prompts, max_sequence_length=length)
    x_BLD = pair[1].encode_prompts(prompts, max_sequence_length=length)
    assert (x_BLD.shape, x_BLD.dtype) == ((len(prompts), length, 32), torch.float32)
    for prompt_LD, wanted_LD in zip(x_BLD, wanted, strict=True):
        assert relative_error(prompt_LD, wanted_LD) <= 1e-6
    assert torch.equal(x_BLD == 0, wanted == 0)
    empty = pair[1].encode_prompts([""], max_sequence_length=length)
    assert relative_error(empty.expand_as(negative), negative) <= 1e-6


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:4], PROMPTS[1:2], PROMPTS[4:5]])
def test_embeddings_are_equal_bit_by_bit(pair, prompts):
    with torch.no_grad():
        wanted = pair[0].encode_prompt(prompts, max_sequence_length=512)[0]
    assert torch.equal(pair[1].encode_prompts(prompts), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_the_truth_as_the_reference(folder, pair, dtype):
    pipe, encoder = reference(folder, dtype), ours(folder, dtype)
    kinds = {name: value.dtype for name, value in encoder.model.state_dict().items()}
    assert kinds == {name: value.dtype for name, value in pipe.text_encoder.state_dict().items()}
    with torch.no_grad():
        wanted = pipe.encode_prompt(PROMPTS[:4], max_sequence_length=512)[0]
        exact = pair[0].encode_prompt(PROMPTS[:4], max_sequence_length=512)[0]
    x_BLD = encoder.encode_prompts(PROMPTS[:4])
    assert x_BLD.dtype == wanted.dtype
    assert torch.equal(x_BLD, wanted)
    assert relative_error(x_BLD, exact) < 0.1


def test_text_weights_are_shared_and_eval(folder):
    model = ours(folder).model
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert not any(part.training for part in model.modules())  # else dropout would be random


def test_cleans_prompts_as_the_reference_does():
    for prompt in [
        *PROMPTS,
        "“quoted” ﬁne ＦＵＬＬ",
        "&amp;quot;",
        "a < b &amp;amp; c",
        "a\u3000b\u00a0c\u200bd\x85e\x1cf",
        "\x1b[31mred",
    ]:
        assert clean_prompt(prompt) == prompt_clean(prompt)
    spaces = [chr(code) for code in range(sys.maxunicode) if chr(code).isspace() or re.match(r"\s", chr(code))]
    for space in spaces:
        assert clean_prompt(f"{space}a{space}{space}b{space}") == prompt_clean(f"{space}a{space}{space}b{space}")
    assert clean_prompt(html.escape(html.escape("<é>"))) == "<é>"


def test_refuses_no_prompts(folder):
    with pytest.raises(RequestError, match="give at least one"):
        ours(folder).encode_prompts([])


def test_refuses_a_tokenizer_larger_than_the_encoder(folder):
    model = build_text_encoder(UMT5 | {"vocab_size": 20})
    with pytest.raises(CheckpointError, match="the tokenizer knows 47 tokens, the text encoder only 20"):
        TextEncoder(model=model, tokenizer=load_tokenizer(folder / "tokenizer"))


def test_refuses_a_folder_without_tokenizer_json(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_refuses_a_tokenizer_without_padding(folder, tmp_path):
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": {"content": "<nothing>"}}')
    with pytest.raises(CheckpointError, match="has no pad_token '<nothing>', which fills prompts up"):
        load_tokenizer(tmp_path / "tokenizer")


@pytest.mark.parametrize("length", [512, 5, 1])
def test_tokens_are_those_of_the_reference(folder, tmp_path, length):
    """Those of a checkpoint, and those of a tokenizer that was built and written here, as transformers reads both."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁ball", -1.0)]
    write_tokenizer(build_tokenizer(vocab + [(letter, -3.0) for letter in LETTERS]), tmp_path)
    for place in (folder / "tokenizer", tmp_path):
        theirs, mine = T5Tokenizer.from_pretrained(place), load_tokenizer(place)
        wanted = theirs(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = mine.encode(PROMPTS, length=length)
        assert torch.equal(ids, wanted.input_ids)
        assert torch.equal(mask, wanted.attention_mask)
        assert len(mine) == len(theirs)
        assert mine.pieces(PROMPTS[0]) == theirs.convert_ids_to_tokens(theirs(PROMPTS[0]).input_ids)


@pytest.mark.parametrize("buckets", [(32, 128), (4, 2), (7, 20)])
def test_positions_fall_into_the_buckets_of_the_reference(buckets):
    names = ("relative_attention_num_buckets", "relative_attention_max_distance")
    reference = UMT5EncoderModel(UMT5Config(**UMT5, **dict(zip(names, buckets, strict=True))))
    attention = reference.encoder.block[0].layer[0].SelfAttention
    offset = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    wanted = attention._relative_position_bucket(offset)
    assert torch.equal(position_buckets(300, *buckets, device=torch.device("cpu")), wanted)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "Unknown"}}'])
def test_refuses_a_broken_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "t5"}, "describes 't5'"),
        ({"d_model": "wide"}, "d_model 'wide'; it must be a whole number above 0"),
        ({"d_model": -3}, "d_model -3; it must be a whole number above 0"),
        ({"num_layers": True}, "num_layers True; it must be a whole number above 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon nan; it must be a number above 0"),
        ({"vocab_size": 10**30}, "below 2\\^31"),
        (
            {"feed_forward_proj": "gated-nothing"},
            "has feed_forward_proj 'gated-nothing'; Wan's text encoder has gated-gelu",
        ),
        ({"feed_forward_proj": "relu"}, "has feed_forward_proj 'relu'"),
        ({"relative_attention_max_distance": 8}, "max_distance 8; it must be above 8, a quarter"),
        ({"relative_attention_num_buckets": 2}, "num_buckets 2; it must be 4 or more"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized weights"),
    ],
)
def test_refuses_a_text_config_it_cannot_build(change, match):
    with pytest.raises(CheckpointError, match=match):
        build_text_encoder(UMT5 | change)


def test_takes_only_what_decides_the_numbers_from_a_config():
    hostile = {
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "dtype": "float16",
    }
    model = build_text_encoder(UMT5 | hostile | {"auto_map": {"AutoModel": "x.py"}})
    assert model.state_dict().keys() == build_text_encoder(UMT5).state_dict().keys()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# --- images ---


@pytest.fixture(scope="module", params=[CLIPVisionModel, CLIPVisionModelWithProjection])
def clip_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = request.param(CLIPVisionConfig(**CLIP))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder / "image_encoder")
    size = {"shortest_edge": 28}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "image_processor")
    return folder, request.param


def images():
    generator = torch.Generator().manual_seed(1)
    pixels = (torch.randint(0, 256, (h, w, 3), generator=generator) for h, w in ((40, 60), (90, 31)))
    return [Image.fromarray(value.to(torch.uint8).numpy()) for value in pixels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeds_images_as_the_reference_does(clip_folder, dtype):
    folder, kind = clip_folder
    pipe = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=None,
        image_encoder=kind.from_pretrained(folder / "image_encoder", dtype=dtype),
        image_processor=CLIPImageProcessorPil.from_pretrained(folder / "image_processor"),
    )
    wanted = pipe.encode_image(images(), torch.device("cpu"))
    model = build_image_encoder(json.loads((folder / "image_encoder" / "config.json").read_text()))
    files = [folder / "image_encoder" / "model.safetensors"]
    report = load_module(model, files, dtype=dtype, rename=image_encoder_key)
    assert report.dropped == (("visual_projection.weight",) if kind is CLIPVisionModelWithProjection else ())
    encoder = ImageEncoder(model=model, processor=load_image_processor(folder / "image_processor"))
    x_BTD = encoder.encode_images(images())
    assert x_BTD.shape == (2, 1 + 4, 16)
    assert x_BTD.dtype == wanted.dtype
    assert torch.equal(x_BTD, wanted)


def test_wan_sized_clip_has_257_tokens():
    model = build_image_encoder(CLIP | {"image_size": 224, "patch_size": 14})
    assert model.embeddings.position_ids.tolist() == [list(range(257))]
    assert all(value.is_meta for value in model.state_dict().values())


def test_takes_the_vision_part_of_a_whole_clip_config():
    model = build_image_encoder({"model_type": "clip", "vision_config": CLIP, "hidden_size": 99})
    assert model.get_parameter("embeddings.class_embedding").shape == (16,)


def test_drops_stored_position_ids():
    assert image_encoder_key("vision_model.embeddings.position_ids") is None
    assert image_encoder_key("vision_model.encoder.layers.0.mlp.fc1.bias") == "encoder.layers.0.mlp.fc1.bias"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (CLIP | {"hidden_act": "nothing"}, "describes no network that can be built"),
        (CLIP | {"patch_size": 0}, "patch_size 0; it must be 1 or more"),
        (CLIP | {"num_attention_heads": 3}, "describes no network that can be built"),
        ({"vision_config": [1]}, "holds no description of a network"),
        (CLIP | {"quantization_config": {}}, "quantized weights"),
    ],
)
def test_refuses_an_image_config_it_cannot_build(config, match):
    with pytest.raises(CheckpointError, match=match):
        build_image_encoder(config)


def test_refuses_a_folder_without_image_processor(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_image_processor(tmp_path)
