"""The denoiser in its fast ways: every combination equals Diffusers, and each saving can be seen to matter."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_wan_dit import CASES, make_inputs, make_ours, make_reference, relative, run_reference, small_spec

from frameloom.errors import RequestError
from frameloom.models.dit_fast import DitChoices, LoopChoices, choose, install, without_weights
from frameloom.models.wan_dit import FrameTimes, collapse_padding
from frameloom.ops.dit_ops import Ops, ops_for
from frameloom.ops.registry import Policy, make_policy
from frameloom.pipeline.stages import Predictor
from frameloom.platform.tuning import Tuner
from frameloom.sampling.guidance import guide
from frameloom.sampling.unipc import make_sampler

CPU = torch.device("cpu")
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SWITCHES = ("prompt_once", "shared_branches", "guidance_batched", "collapses_padding", "fuses_qkv", "packs", "ops")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def padded_texts(case, lengths=(37, 3), seed=5):
    """Two prompts (B, 512, E) with zeros past so many tokens."""
    torch.manual_seed(seed)
    texts = torch.randn(2, case.size[0], 512, case.spec.text_dim)
    for text, length in zip(texts, lengths, strict=True):
        text[:, length:] = 0
    return list(texts)


def both_by_reference(reference, inputs, texts):
    return torch.stack([run_reference(reference, inputs | {"text": text}) for text in texts])


def in_ways(reference, spec, on):
    """Our network with the switches in `on`, and how its steps are computed."""
    dit = make_ours(reference, spec)
    ops, _ = ops_for("cpu") if "ops" in on else (Ops(), ())
    loop = LoopChoices(**{name: name in on for name in SWITCHES[:3]})
    choices = DitChoices(
        ops=ops,
        loop=loop,
        collapses_padding="collapses_padding" in on,
        fuses_qkv="fuses_qkv" in on,
        packs_linear="packs" in on,
        packs_mlp="packs" in on,
    )
    install(dit, choices)
    return dit, loop


@pytest.mark.parametrize("name", ["t2v", "t2v-batch", "t2v-no-cross-norm"])
def test_every_combination_of_the_savings_equals_diffusers(name):
    case = CASES[name]
    reference = make_reference(case.spec)
    inputs, texts = make_inputs(case), padded_texts(case)
    expected = both_by_reference(reference, inputs, texts)
    for flags in itertools.product((False, True), repeat=len(SWITCHES)):
        on = [name for name, flag in zip(SWITCHES, flags, strict=True) if flag]
        dit, loop = in_ways(reference, case.spec, on)
        velocities = Predictor(texts, loop)(dit, inputs["x"], inputs["timestep"])
        assert relative(torch.stack(velocities), expected) <= 1e-5, on


def test_an_image_and_several_steps_use_what_was_read_once():
    case = CASES["i2v-clip"]
    reference, inputs = make_reference(case.spec), make_inputs(case)
    dit, _ = in_ways(reference, case.spec, SWITCHES)
    prompt = dit.read_prompt(inputs["text"], inputs["image"])
    for t in (900.0, 20.0):
        now = inputs | {"timestep": torch.tensor([t])}
        (velocity,) = dit.velocities(inputs["x"], now["timestep"], [prompt])
        assert relative(velocity, run_reference(reference, now)) <= 1e-5


def test_the_weight_of_the_padding_is_needed():
    case = CASES["t2v"]
    reference, inputs = make_reference(case.spec), make_inputs(case)
    text = padded_texts(case)[1]
    dit, _ = in_ways(reference, case.spec, ["collapses_padding"])
    prompt = dit.read_prompt(text)
    assert prompt.of_blocks[0].text[0].shape[1] == 3 + 1
    expected = run_reference(reference, inputs | {"text": text})
    (velocity,) = dit.velocities(inputs["x"], inputs["timestep"], [prompt])
    assert relative(velocity, expected) <= 1e-5
    forgotten = prompt._replace(of_blocks=tuple(block._replace(bias_BS=None) for block in prompt.of_blocks))
    (velocity,) = dit.velocities(inputs["x"], inputs["timestep"], [forgotten])
    assert relative(velocity, expected) > 1e-3


@pytest.mark.parametrize(("length", "kept"), [(512, 512), (511, 512), (510, 511), (1, 2), (0, 1)])
def test_padding_is_cut_off_where_there_is_some(length, kept):
    text = torch.randn(2, 512, 6)
    text[:, length:] = 0
    text[1, length // 2 :] = 0  # a shorter prompt in the same batch
    short, bias = collapse_padding(text)
    assert torch.equal(short, text[:, :kept])
    if length > 510:
        assert bias is None
    else:
        assert bias.exp().sum().item() == pytest.approx(512)
        assert bias[:-1].eq(0).all()


@pytest.mark.parametrize("given", [[0], [0, 2], []])
def test_frames_with_their_own_timestep_equal_tokens_with_theirs(given):
    case = CASES["ti2v-batch"]
    reference, inputs = make_reference(case.spec), make_inputs(case)
    batch, frames, height, width = case.size
    t = torch.tensor([900.0, 300.0, 41.0])
    index = torch.ones(frames, dtype=torch.long)
    index[[frame for frame in given if frame < frames]] = 0
    values = torch.stack((torch.zeros(batch), t), dim=1)
    per_token = values[:, index].repeat_interleave(height * width // 4, dim=1)
    expected = run_reference(reference, inputs | {"timestep": per_token})
    dit, _ = in_ways(reference, case.spec, SWITCHES)
    assert relative(dit(inputs["x"], FrameTimes(values, index), inputs["text"]), expected) <= 1e-5
    with pytest.raises(RequestError, match=r"timestep has shape \(3,\); give \(2,\)"):
        dit(inputs["x"], FrameTimes(values, torch.zeros(3, dtype=torch.long)), inputs["text"])


def test_nothing_in_a_step_waits_for_the_device():
    """A tensor on the meta device has no numbers: whatever asks for one, as a host that waits would, raises."""
    spec = small_spec()
    dit = without_weights(spec, torch.float32, DitChoices(ops=ops_for("cpu")[0], packs_mlp=True, fuses_qkv=True))
    meta = torch.device("meta")
    prompts = [dit.read_prompt(torch.empty(1, 512, spec.text_dim, device=meta)) for _ in range(2)]
    x, t = torch.empty(1, 4, 3, 4, 6, device=meta), torch.empty(1, device=meta)
    first, second = dit.velocities(x, t, prompts)
    sampler = make_sampler({"_class_name": "UniPCMultistepScheduler", **FLOW}, 4)
    after, state = sampler.step(guide(first, second, 5.0), x, sampler.start())
    after, _ = sampler.step(guide(first, second, 5.0), after, state)
    assert after.is_meta
    assert after.shape == x.shape
    times = FrameTimes(torch.empty(1, 2, device=meta), torch.empty(3, device=meta, dtype=torch.long))
    (velocity,) = dit.velocities(x, times, prompts[:1])
    assert velocity.is_meta


def test_weights_that_were_laid_out_anew_are_kept_once():
    spec = small_spec()
    dit, _ = in_ways(make_reference(spec), spec, SWITCHES)
    left = set(dict(dit.named_parameters()))
    gone = (
        "attn1.to_q.weight",
        "attn1.to_v.bias",
        "attn1.to_out.0.weight",
        "attn2.to_q.weight",
        "ffn.net.0.proj.weight",
    )
    assert not any(name.endswith(gone) for name in left)
    assert "blocks.0.attn2.to_k.weight" in left


def test_what_the_user_allows_decides(tmp_path):
    spec = small_spec()
    dit, names = (
        make_ours(make_reference(spec), spec),
        ["dit.prompt_once", "dit.collapsed_padding", "dit.linear_packed"],
    )

    def chosen(policy):
        return choose(dit, policy, Tuner(CPU, tmp_path), platform_name="cpu")

    bitwise = chosen(Policy(exactness="bitwise"))
    assert bitwise.loop == LoopChoices(prompt_once=True, shared_branches=True)
    assert bitwise.ops == Ops()
    assert not any((bitwise.collapses_padding, bitwise.packs_linear, bitwise.packs_mlp, bitwise.fuses_qkv))
    off = chosen(make_policy("rounding", [f"{name}=off" for name in names], names))
    assert not any((off.loop.prompt_once, off.loop.shared_branches, off.loop.guidance_batched))
    assert not any((off.collapses_padding, off.packs_linear))
    on = chosen(make_policy("rounding", ["dit.linear_packed=on"], names))
    assert on.packs_linear
    assert on.fuses_qkv
    with pytest.raises(RequestError, match=r"dit\.shared_branches=on is not possible here: it needs dit\.prompt_once"):
        chosen(Policy(forced={"dit.prompt_once": False, "dit.shared_branches": True}))


class Forgetful:
    """A network that has no memory for more than one branch at a time."""

    def __init__(self, dit):
        self.dit, self.batches = dit, []

    def read_prompt(self, text, image=None):
        return self.dit.read_prompt(text, image)

    def velocities(self, x, timestep, prompts):
        self.batches.append(prompts[0].batch_size)
        if prompts[0].batch_size > x.shape[0]:
            raise torch.OutOfMemoryError("no")
        return self.dit.velocities(x, timestep, prompts)


def test_a_batch_without_memory_falls_back_once_and_says_so(caplog):
    case = CASES["t2v"]
    reference, inputs = make_reference(case.spec), make_inputs(case)
    texts = padded_texts(case)
    dit, loop = in_ways(reference, case.spec, SWITCHES)
    forgetful = Forgetful(dit)
    predictor = Predictor(texts, loop)
    for _ in range(2):
        velocities = predictor(forgetful, inputs["x"], inputs["timestep"])
        assert relative(torch.stack(velocities), both_by_reference(reference, inputs, texts)) <= 1e-5
    assert forgetful.batches == [2, 1, 1]
    assert caplog.text.count("memory ran out with both branches") == 1
    alone = Predictor(texts, replace(loop, guidance_batched=False))
    with pytest.raises(RuntimeError, match="odd"):
        alone(Broken(), inputs["x"], inputs["timestep"])


class Broken:
    """A network whose error is no lack of memory."""

    def read_prompt(self, text, image=None):
        raise RuntimeError("odd")
