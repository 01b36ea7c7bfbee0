"""A model makes the same video wherever its weights are; what came for a stage is let go; prompts are read once."""

import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_files import in_blocks, plain, write
from safetensors.torch import save_file

import frameloom
from frameloom.engine.dit import load_fast_dit, load_plain_dit, make_fast_dit
from frameloom.engine.prompts import CachedPrompts
from frameloom.engine.residence import Residents
from frameloom.errors import CheckpointError, RequestError
from frameloom.memory.layout import Layout
from frameloom.memory.stream import Stream
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import Linear, is_quantized, largest_plain_bytes
from frameloom.ops.registry import Policy
from frameloom.types import Residence

SIZE = {"width": 64, "height": 32, "num_frames": 5, "steps": 3}
AWAY = ("text=streamed,transformer=streamed", "text=moved,transformer=moved")
CPU = torch.device("cpu")


def latents(folder, *, steps=3, inputs=(), **options):
    with frameloom.load(folder, exactness="bitwise", prompt_cache=False, **options) as engine:
        return engine.generate("a cat", output="latents", **{**SIZE, "steps": steps, **dict(inputs)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["one expert", "two experts", "per-token timesteps", "vace", "vace, two experts"])
def test_the_bits_are_the_same_wherever_the_weights_are(checkpoint_of, kind, dtype):
    options = {"dtype": dtype, "quantized": "keep"}
    wanted = latents(checkpoint_of(kind), **options)
    assert wanted.std() > 0
    for residence in AWAY:
        assert torch.equal(latents(checkpoint_of(kind), residence=residence, **options), wanted)


def test_the_bits_are_the_same_from_an_image(checkpoint_of):
    picture = frameloom.read_image(torch.randint(0, 255, (32, 64, 3), dtype=torch.uint8).numpy())
    wanted, *found = (
        latents(checkpoint_of("image"), residence=where, inputs={"image": picture}) for where in ("auto", *AWAY)
    )
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("rewrite", ["dit.prompt_once", "dit.shared_branches", "dit.guidance_batched"])
def test_the_bits_are_the_same_in_other_orders_of_work(checkpoint_of, rewrite):
    options = {"rewrites": [f"{rewrite}=off"]}
    wanted, *found = (latents(checkpoint_of("vace"), residence=where, **options) for where in ("auto", *AWAY))
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("rewrites", [(), ("dit.mlp_rows=on",)], ids=str)
def test_loras_are_computed_beside_weights_that_come_and_go(checkpoint_of, tmp_path, rewrites):
    root, path = "diffusion_model.blocks.1", str(tmp_path / "style.safetensors")
    shapes = {"cross_attn.k": (32, 32), "self_attn.q": (32, 32), "ffn.0": (48, 32)}
    tensors = {f"{root}.norm3.diff_b": torch.randn(32)}
    for name, (rows, columns) in shapes.items():
        tensors[f"{root}.{name}.lora_down.weight"] = torch.randn(2, columns)
        tensors[f"{root}.{name}.lora_up.weight"] = torch.randn(rows, 2)
    save_file(tensors, path)
    without = latents(checkpoint_of(), rewrites=rewrites)
    with frameloom.load(checkpoint_of(), exactness="bitwise", rewrites=rewrites) as engine:
        engine.set_loras([path])
        wanted = engine.generate("a cat", output="latents", **SIZE)
    assert not torch.allclose(wanted, without)
    for residence in AWAY:
        assert torch.equal(latents(checkpoint_of(), residence=residence, loras=[path], rewrites=rewrites), wanted)


# --- quantized weights, and the ways that are chosen ---

SPEC = TransformerSpec(
    num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32, freq_dim=32, ffn_dim=512,
    num_layers=3,
)  # fmt: skip


def component(path, kind=None):
    """A transformer, its blocks' matrices quantized; plain ones are large enough to compute where they lie."""
    torch.manual_seed(0)
    tensors = {}
    for name, value in WanDiT(SPEC).state_dict().items():
        quantized = kind is not None and value.dim() == 2 and "blocks" in name
        tensors[name] = in_blocks(value, kind) if quantized else plain(value)
    return write(path, tensors)


def streaming(residence=Residence.STREAMED):
    return Residents(layout=Layout(transformer=residence), device=CPU, transformer=Stream(CPU))


@pytest.mark.parametrize("quantized", ["keep", "expand"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "Q8_0", "Q4_K"])
@torch.inference_mode()
def test_a_transformer_that_is_streamed_has_the_bits_of_a_resident_one(tmp_path, kind, dtype, quantized):
    part, policy = component(tmp_path / "x", kind), Policy(exactness="bitwise")
    resident = load_fast_dit(part, SPEC, dtype, CPU, policy=policy, quantized=quantized).dit
    residents = streaming()
    streamed = make_fast_dit(
        load_plain_dit(part, SPEC, dtype, CPU, quantized=quantized, residents=residents), policy=policy
    ).dit
    x, text = torch.randn(1, 4, 2, 6, 4), torch.randn(2, 1, 20, 32)
    for dit in (resident, streamed):
        dit.velocity = dit.velocities(x, torch.tensor([300.0]), [dit.read_prompt(one) for one in text])
    assert all(torch.equal(a, b) for a, b in zip(resident.velocity, streamed.velocity, strict=True))
    weights = [module.stored for module in streamed.blocks.modules() if isinstance(module, Linear)]
    assert {weight.form for weight in weights} == {"streamed"}
    assert not is_quantized(streamed)
    assert (largest_plain_bytes(streamed) > 0) == (kind is not None)
    stays, whole = (sum(parameter.nbytes for parameter in dit.parameters()) for dit in (streamed, resident))
    assert stays + residents.transformer.held_bytes < whole or kind is not None


def test_rewrites_that_hold_weights_in_another_form_say_why_they_are_not_used(checkpoint_of):
    with frameloom.load(checkpoint_of(), residence="transformer=streamed") as engine:
        told = {decision.name: decision for decision in engine.decisions}
    for name in ("dit.qkv_fused", "dit.linear_packed", "dit.mlp_packed"):
        assert (told[name].used, told[name].reason) == (False, "the weights are streamed")
    with pytest.raises(RequestError, match=r"dit\.mlp_packed=on is not possible here: the weights are streamed"):
        frameloom.load(checkpoint_of(), residence="transformer=streamed", rewrites=["dit.mlp_packed=on"])


# --- memory ---


@pytest.mark.parametrize(
    ("memory", "text", "transformer"),
    [("auto", "resident", "resident"), ("8GB", "resident", "resident"), ("100KB", "streamed", "streamed")],
)
def test_a_bound_for_the_memory_decides_and_the_log_says_why(checkpoint_of, caplog, memory, text, transformer):
    # Without bands: of a picture this large, counting what the narrowest take is half a minute's work.
    options = {"memory": memory, "rewrites": ["vae.bands=off"]}
    with caplog.at_level(logging.INFO, "frameloom"), frameloom.load(checkpoint_of(), **options):
        pass
    (line,) = (text for text in caplog.messages if text.startswith("text encoder "))
    assert line.startswith(f"text encoder {text}, transformer {transformer}: ")
    assert re.search(r"no bound was given|81 frames of 832x480, 50 steps take [\d.]+ GB of", line)


def test_weights_that_are_missing_are_told_when_the_model_is_loaded_wherever_they_will_be(tmp_path):
    part = component(tmp_path / "x")
    tensors = {name: entry for name, entry in part.tensors.items() if name != "blocks.1.attn1.to_q.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.attn1\.to_q\.weight"):
        load_plain_dit(replace(part, tensors=tensors), SPEC, torch.float32, CPU, residents=streaming())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what is mapped")
@torch.inference_mode()
def test_what_came_for_a_stage_is_let_go_after_it_and_comes_again(tmp_path):
    def is_mapped():
        return str(tmp_path / "x") in Path("/proc/self/maps").read_text("utf-8")

    part, residents = component(tmp_path / "x"), streaming(Residence.MOVED)
    dit = load_plain_dit(part, SPEC, torch.float32, CPU, residents=residents)
    results = []
    for _ in range(2):
        with residents.during("denoise"):
            results.append(dit(torch.ones(1, 4, 2, 6, 4), torch.tensor([300.0]), torch.ones(1, 20, 32)))
            assert len(residents.transformer._held) == 1
            assert is_mapped()
        assert len(residents.transformer._held) == 0
    assert torch.equal(*results)


def test_an_unknown_residence_or_memory_is_refused_before_a_file_is_opened(run):
    for words in (["--residence", "vae=away"], ["--memory", "much"]):
        code, out, err = run("generate", "a cat", "--model", "/nowhere", *words)
        assert (code, out) == (2, "")
        assert words[1] in err


# --- prompts ---


def prompts_of(folder, prompt="a cat", **options):
    with frameloom.load(folder, exactness="bitwise", **options) as engine:
        return engine.generate(prompt, output="latents", **SIZE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMELOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


def entries(cache):
    return sorted(cache.glob("*")) if cache.exists() else []


@pytest.mark.parametrize("residence", ["auto", "text=streamed"])
def test_a_prompt_that_was_read_before_has_the_same_bits_from_the_cache(checkpoint_of, cache, caplog, residence):
    wanted = prompts_of(checkpoint_of(), prompt_cache=False)
    assert entries(cache) == []
    with caplog.at_level(logging.INFO, "frameloom"):
        found = [prompts_of(checkpoint_of(), residence=residence) for _ in range(2)]
    assert all(torch.equal(one, wanted) for one in found)
    assert sum("text encoder is not needed" in line for line in caplog.messages) == 2  # with the prompt, and without
    assert len(entries(cache)) == 2
    assert not torch.equal(prompts_of(checkpoint_of(), "a dog"), wanted)
    prompts_of(checkpoint_of(), dtype="bfloat16")
    assert len(entries(cache)) == 5  # the dog, and both again in the other dtype


def test_a_hit_reads_nothing_of_the_text_encoder(checkpoint_of, cache, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint_of().rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(checkpoint_of())
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    wanted = prompts_of(folder)
    with frameloom.load(folder, exactness="bitwise", residence="text=streamed") as engine:
        (folder / "text_encoder" / "model.safetensors").unlink()
        assert torch.equal(engine.generate("a cat", output="latents", **SIZE), wanted)
        with pytest.raises(CheckpointError, match="cannot be mapped"):
            engine.generate("a dog", output="latents", **SIZE)


def test_a_damaged_entry_is_made_again_and_the_oldest_give_way(checkpoint_of, cache, caplog):
    wanted = prompts_of(checkpoint_of())
    for path in entries(cache):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert torch.equal(prompts_of(checkpoint_of()), wanted)
    assert "is damaged" in caplog.text
    with frameloom.load(checkpoint_of()) as engine:
        cached = engine._open.text_encoder
        assert isinstance(cached, CachedPrompts)
        size = max(path.stat().st_size for path in entries(cache))
        small = CachedPrompts(encoder=cached.encoder, folder=cache, facts="x", most_bytes=2 * size)
        before = set(entries(cache))
        for prompt in ("one", "two", "three"):
            small.encode_prompts([prompt])
        assert len(entries(cache)) <= 3
        assert before.isdisjoint(entries(cache))


def test_a_cache_that_cannot_be_written_is_told_and_the_run_goes_on(checkpoint_of, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.INFO, "frameloom"):
        prompts_of(checkpoint_of())
    assert "features are not kept" in caplog.text
