"""The VACE network against the reference network of Diffusers, in every way that its steps may be computed."""

import dataclasses

import pytest
import torch
from diffusers import WanVACETransformer3DModel
from test_dit_fast import SWITCHES, padded_texts
from test_wan_dit import TEXT_TOKENS, Case, random_parameter, random_timestep, relative, small_spec, with_clip

from frameloom.errors import CheckpointError, InternalError, RequestError
from frameloom.memory.dit import StepPlanner
from frameloom.models.dit_fast import DitChoices, LoopChoices, install, without_weights
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.vace import VaceDiT, make_dit, strengths_for, under_empty_control
from frameloom.models.wan_dit import Control, FrameTimes, WanDiT, run_in_order
from frameloom.ops.dit_ops import Ops, ops_for


def vace(spec, *layers, channels=6):
    return VaceSpec(**dataclasses.asdict(spec), vace_layers=layers, vace_in_channels=channels)


CASES = {
    "one": Case(vace(small_spec(), 0), (1, 3, 10, 14)),
    "some": Case(vace(small_spec(num_layers=5), 0, 2, 3), (1, 2, 6, 4)),
    "all-batch": Case(vace(small_spec(num_attention_heads=3, attention_head_dim=10), 0, 1), (2, 1, 6, 14)),
    "patch144": Case(vace(small_spec(patch_size=(1, 4, 4)), 0, 1, channels=96), (3, 3, 8, 20)),
    "no-cross-norm": Case(vace(small_spec(cross_attn_norm=False, num_layers=3), 0, 2), (1, 3, 6, 10)),
    "clip": Case(vace(with_clip(), 0, 1), (1, 3, 6, 4)),
}
STRENGTHS = (0.6, 1.0, -0.3)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make_reference(spec, seed=0):
    torch.manual_seed(seed)
    reference = WanVACETransformer3DModel(**dataclasses.asdict(spec))
    for name, parameter in reference.named_parameters():
        parameter.copy_(random_parameter(name, parameter))
    return reference.eval()


def make_ours(reference, spec):
    ours = make_dit(spec)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval()


def make_inputs(case, seed=1, strengths=1.0):
    torch.manual_seed(seed)
    batch, *size = case.size
    spec = case.spec
    control = Control(torch.randn(batch, spec.vace_in_channels, *size), strengths_for(spec, strengths))
    image = None if spec.image_dim is None else torch.randn(batch, 11, spec.image_dim)
    text = torch.randn(batch, TEXT_TOKENS, spec.text_dim)
    x = torch.randn(batch, spec.in_channels, *size)
    return {"x": x, "timestep": random_timestep(case), "text": text, "image": image, "control": control}


def run_ours(model, inputs):
    return model(*inputs.values())


def run_reference(model, inputs, dtype=torch.float32):
    image, control = inputs["image"], inputs["control"]
    return model(
        inputs["x"].to(dtype),
        inputs["timestep"],
        inputs["text"].to(dtype),
        None if image is None else image.to(dtype),
        control.x_BCTHW.to(dtype),
        torch.tensor(control.strengths).to(dtype),
        return_dict=False,
    )[0]


def in_ways(reference, spec, on):
    """Our network with the switches in `on`."""
    dit = make_ours(reference, spec)
    ops, _ = ops_for("cpu") if "ops" in on else (Ops(), ())
    install(
        dit,
        DitChoices(
            ops=ops,
            loop=LoopChoices(),
            collapses_padding="collapses_padding" in on,
            fuses_qkv="fuses_qkv" in on,
            packs_linear="packs" in on,
            packs_mlp="packs" in on,
        ),
    )
    return dit


def read(dit, texts, control):
    return [dit.read_prompt(text)._replace(control=control) for text in texts]


@pytest.mark.parametrize("seed", [0, 7])
def test_equals_the_reference(case, seed):
    reference = make_reference(case.spec, seed)
    inputs = make_inputs(case, seed + 1)
    expected = run_reference(reference, inputs)
    velocity = run_ours(make_ours(reference, case.spec), inputs)
    assert velocity.shape == expected.shape
    assert relative(velocity, expected) <= 1e-5


def test_every_hint_may_count_differently(case):
    reference = make_reference(case.spec)
    inputs = make_inputs(case, strengths=STRENGTHS[: len(case.spec.vace_layers)])
    expected = run_reference(reference, inputs)
    ours = make_ours(reference, case.spec)
    assert relative(run_ours(ours, inputs), expected) <= 1e-5
    assert relative(run_ours(ours, make_inputs(case)), expected) > 1e-2


def test_the_control_and_every_strength_matter(case):
    model = make_ours(make_reference(case.spec), case.spec)
    inputs = make_inputs(case)
    control, velocity = inputs["control"], run_ours(model, inputs)
    others = [control._replace(x_BCTHW=control.x_BCTHW.roll(1, -1))]
    for index in range(len(control.strengths)):
        strengths = tuple(0.5 if at == index else 1.0 for at in range(len(control.strengths)))
        others.append(control._replace(strengths=strengths))
    for other in others:
        assert relative(run_ours(model, inputs | {"control": other}), velocity) > 1e-3


def test_strength_zero_is_the_network_without_its_vace_blocks(case):
    model = make_ours(make_reference(case.spec), case.spec)
    plain_spec = TransformerSpec(**{k: v for k, v in dataclasses.asdict(case.spec).items() if "vace" not in k})
    plain = WanDiT(plain_spec)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "vace" not in k}, strict=True)
    inputs = make_inputs(case, strengths=0.0)
    expected = plain(*(value for name, value in inputs.items() if name != "control"))
    assert torch.equal(run_ours(model, inputs), expected)


@pytest.mark.parametrize("name", ["some", "all-batch"])
def test_bf16_is_as_accurate_as_the_reference(name, tmp_path):
    case = CASES[name]
    exact = make_reference(case.spec)
    exact.save_pretrained(tmp_path)
    narrow = WanVACETransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    with torch.device("meta"):
        ours = make_dit(case.spec)
    kept = {k: v if WanDiT.keep_in_fp32(k) else v.bfloat16() for k, v in exact.state_dict().items()}
    ours.load_state_dict(kept, strict=True, assign=True)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in narrow.state_dict().items()}
    inputs = make_inputs(case, strengths=STRENGTHS[: len(case.spec.vace_layers)])
    expected = run_reference(exact, inputs)
    reference_error = relative(run_reference(narrow, inputs, torch.bfloat16), expected)
    assert 1e-4 < reference_error < 0.1  # a real bf16 run, and not noise
    assert relative(run_ours(ours.eval(), inputs), expected) <= 1.1 * reference_error


@pytest.mark.parametrize("on", [(), *((switch,) for switch in SWITCHES[3:]), SWITCHES], ids=str)
@pytest.mark.parametrize("name", ["one", "some", "no-cross-norm"])
def test_in_every_way_guidance_equals_the_reference(name, on):
    case = CASES[name]
    reference, inputs = make_reference(case.spec), make_inputs(case, strengths=0.7)
    texts = padded_texts(case)
    expected = torch.stack([run_reference(reference, inputs | {"text": text}) for text in texts])
    dit = in_ways(reference, case.spec, on)
    in_turn = [run_ours(dit, inputs | {"text": text}) for text in texts]
    shared = dit.velocities(inputs["x"], inputs["timestep"], read(dit, texts, inputs["control"]))
    together = read(dit, [torch.cat(texts)], inputs["control"])
    (both,) = dit.velocities(inputs["x"], inputs["timestep"], together)
    for velocities in (in_turn, shared, both.chunk(2)):
        assert relative(torch.stack(list(velocities)), expected) <= 1e-5


def test_what_was_read_once_serves_all_steps_and_both_ways_of_guidance():
    case = CASES["all-batch"]
    reference, inputs = make_reference(case.spec), make_inputs(case)
    dit = make_ours(reference, case.spec)
    texts = [inputs["text"], inputs["text"].flip(1)]
    prompts = read(dit, texts, inputs["control"])
    for t in (900.0, 20.0):
        now = inputs | {"timestep": torch.full((2,), t)}
        for text, velocity in zip(texts, dit.velocities(inputs["x"], now["timestep"], prompts), strict=True):
            assert relative(velocity, run_reference(reference, now | {"text": text})) <= 1e-5


def test_one_control_serves_a_batch():
    case = CASES["all-batch"]
    model, inputs = make_ours(make_reference(case.spec), case.spec), make_inputs(case)
    one = inputs["control"].x_BCTHW[:1]
    shared = run_ours(model, inputs | {"control": inputs["control"]._replace(x_BCTHW=one)})
    repeated = run_ours(model, inputs | {"control": inputs["control"]._replace(x_BCTHW=one.repeat(2, 1, 1, 1, 1))})
    assert relative(shared, repeated) <= 1e-6


def test_frames_with_their_own_timestep_equal_tokens_with_theirs():
    case = CASES["some"]
    model, inputs = make_ours(make_reference(case.spec), case.spec), make_inputs(case)
    times = FrameTimes(torch.tensor([[0.0, 700.0]]), torch.tensor([0, 1]))
    tokens = torch.tensor([[0.0, 700.0]]).repeat_interleave(6, dim=1)
    expected = run_ours(model, inputs | {"timestep": tokens})
    assert relative(run_ours(model, inputs | {"timestep": times}), expected) <= 1e-5


def test_state_dict_loads_in_the_reference(case):
    ours = make_dit(case.spec).eval()
    reference = WanVACETransformer3DModel(**dataclasses.asdict(case.spec)).eval()
    reference.load_state_dict(ours.state_dict(), strict=True)
    inputs = make_inputs(case)
    assert relative(run_ours(ours, inputs), run_reference(reference, inputs)) <= 1e-5


def test_run_blocks_gets_the_networks_own_blocks_and_may_leave_some_out():
    case = CASES["some"]  # hints after 0, 2 and 3 of 5
    model, inputs = make_ours(make_reference(case.spec), case.spec), make_inputs(case)
    seen = []

    def without(*left_out):
        def run(blocks, x_BLD, step, prompts):
            seen.append(len(blocks))
            kept = [index for index in range(len(blocks)) if index not in left_out]
            prompts = [prompt._replace(of_blocks=tuple(prompt.of_blocks[i] for i in kept)) for prompt in prompts]
            sums = dataclasses.replace(step, sums_NBM6D=step.sums_NBM6D[kept])
            return run_in_order([blocks[i] for i in kept], x_BLD, sums, prompts)

        return run

    model.run_blocks = without(2)
    shorter = run_ours(model, inputs)
    model.run_blocks = without()
    assert relative(run_ours(model, inputs), shorter) > 1e-2
    hint_of_2 = inputs["control"]._replace(strengths=(1.0, 5.0, 1.0))  # the block that is left out asks for none
    model.run_blocks = without(2)
    assert torch.equal(run_ours(model, inputs | {"control": hint_of_2}), shorter)
    assert seen == [5, 5, 5]


def test_a_hint_is_given_once():
    case = CASES["some"]
    model, inputs = make_ours(make_reference(case.spec), case.spec), make_inputs(case)

    def twice(blocks, x_BLD, step, prompts):
        run_in_order(blocks, x_BLD, step, prompts)
        return run_in_order(blocks, x_BLD, step, prompts)

    model.run_blocks = twice
    with pytest.raises(InternalError, match="hint after layer 0 was asked for twice"):
        run_ours(model, inputs)


def test_an_empty_control_lets_shapes_be_computed():
    case = CASES["patch144"]
    with torch.device("meta"):
        dit = make_dit(case.spec)
        inputs = make_inputs(case)
    prompt = under_empty_control(dit.read_prompt(inputs["text"]), dit, inputs["x"])
    (velocity,) = dit.velocities(inputs["x"], inputs["timestep"], [prompt])
    assert velocity.shape == inputs["x"].shape
    plain = WanDiT(small_spec())
    prompt = plain.read_prompt(torch.randn(1, 4, 20))
    assert under_empty_control(prompt, plain, torch.randn(1, 4, 1, 2, 2)) is prompt


def test_memory_is_planned_with_the_blocks_beside():
    spec = CASES["some"].spec
    without = TransformerSpec(**{k: v for k, v in dataclasses.asdict(spec).items() if "vace" not in k})
    options = {"dtype": torch.float32, "choices": DitChoices(fuses_qkv=True), "device": torch.device("meta")}
    assert isinstance(without_weights(spec, torch.float32, DitChoices(packs_mlp=True)), VaceDiT)
    shape = (1, spec.in_channels, 5, 32, 32)
    needed, needed_without = (StepPlanner(spec=one, **options).needed(shape) for one in (spec, without))
    tokens = 2 * 5 * 16 * 16  # of both branches
    assert needed > needed_without + tokens * spec.dim * 4  # the stream of the control itself


def test_a_spec_with_vace_layers_makes_the_network_that_has_them():
    config = {"num_layers": 5, "vace_layers": [0, 2, 3], "vace_in_channels": 20, "qk_norm": "rms_norm_across_heads"}
    spec = TransformerSpec.from_config({**config, "_class_name": "WanVACETransformer3DModel"})
    assert isinstance(spec, VaceSpec)
    assert (spec.vace_layers, spec.vace_in_channels) == ((0, 2, 3), 20)
    assert spec.first_layers(3).vace_layers == (0, 2)
    assert spec.first_layers(9) == spec
    assert (spec.num_blocks, spec.first_layers(3).num_blocks) == (8, 5)
    assert type(TransformerSpec.from_config({"num_layers": 5, "vace_layers": None})) is TransformerSpec
    with torch.device("meta"):
        assert isinstance(make_dit(spec.first_layers(1)), VaceDiT)
        assert type(make_dit(small_spec())) is WanDiT


@pytest.mark.parametrize("layers", [[-1], ["0"], [0, True], 3, [0.0], [0, 10**9]])
def test_vace_layers_that_are_no_layers_are_refused(layers):
    with pytest.raises(CheckpointError, match=r"vace_layers .*; it must be a list of whole numbers"):
        TransformerSpec.from_config({"vace_layers": layers})


@pytest.mark.parametrize("layers", [(), (1,), (0, 0), (0, 2, 1), (0, 5)])
def test_vace_layers_that_make_no_network_are_refused(layers):
    with pytest.raises(CheckpointError, match="must begin with 0 and rise, below the 5 layers"):
        make_dit(vace(small_spec(num_layers=5), *layers))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0, 2.0], "2 control strengths do not fit 3 VACE layers; give 1 or 3"),
        ([], "0 control strengths"),
        ([1.0, float("nan"), 1.0], "is no finite number"),
        (float("inf"), "is no finite number"),
    ],
)
def test_strengths_that_do_not_fit_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        strengths_for(CASES["some"].spec, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda control: None, "a VACE checkpoint, which computes under a control"),
        (lambda c: c._replace(x_BCTHW=c.x_BCTHW[:, :5]), "the control has 5 channels; this checkpoint takes 6"),
        (lambda c: c._replace(x_BCTHW=c.x_BCTHW[:, :, :1]), r"1 samples of \[1, 6, 4\] latent cells; prepare 1, or"),
        (lambda c: c._replace(x_BCTHW=c.x_BCTHW.repeat(2, 1, 1, 1, 1)), "the control has 2 samples"),
        (lambda c: c._replace(strengths=(1.0,)), "1 control strengths do not fit 3 VACE layers"),
    ],
)
def test_a_control_that_does_not_fit_is_refused(change, message):
    case = CASES["some"]
    model, inputs = make_dit(case.spec), make_inputs(case)
    with pytest.raises(RequestError, match=message):
        run_ours(model, inputs | {"control": change(inputs["control"])})
