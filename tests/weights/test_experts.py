"""The two noise experts: told apart by the names of their files, and found beside each other."""

import json
import logging
import math
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import published_transformer

import frameloom
from frameloom.errors import CheckpointError
from frameloom.weights.convert import convert
from frameloom.weights.experts import files_near, pair_of, the_other
from frameloom.weights.source import open_checkpoint, open_parts


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"),
        ("HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"),
        (
            "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
            "Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
        ),
        (
            "wan2.2_i2v_A14b_high_noise_scaled_fp8_e4m3.safetensors",
            "wan2.2_i2v_A14b_low_noise_scaled_fp8_e4m3.safetensors",
        ),
        ("high_noise_model/model-00001-of-00006.safetensors", "low_noise_model/model-00001-of-00006.safetensors"),
        ("flow-slow/x.HIGH.gguf", "flow-slow/x.LOW.gguf"),
        ("low/x_high.gguf", "low/x_low.gguf"),
    ],
)
def test_the_two_noise_experts_are_found_by_their_names(tmp_path, high, low):
    paths = tmp_path / high, tmp_path / low
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [pair_of(path, files_near(path)) for path in paths]
    assert [(one.is_high, one.others, one.differs) for one in found] == [
        (True, (paths[1],), ""),
        (False, (paths[0],), ""),
    ]


def test_where_the_other_expert_would_be_is_said_though_it_is_not_there():
    pair = pair_of(Path("/x/T2V_HIGH.gguf"), [])
    assert (pair.expected, pair.others) == (Path("/x/T2V_LOW.gguf"), ())


@pytest.mark.parametrize(
    "name", ["flow.gguf", "slow_highres.gguf", "wan2.1_t2v_14B.safetensors", "high_low_merged.gguf"]
)
def test_a_name_that_says_neither_has_no_pair(name):
    assert pair_of(Path("/x") / name, [Path("/x/low.gguf"), Path("/x/high.gguf")]) is None


HIGH = "Wan2.2-T2V-A14B-High-Noise-v1.1-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("near", "others", "differs"),
    [
        (["Low-Noise-v1.0-Q4_K_M"], ["Low-Noise-v1.0-Q4_K_M"], "version"),
        (["Low-Noise-v1.0-Q8_0"], ["Low-Noise-v1.0-Q8_0"], "version and quantization"),
        (["low_noise_v1.1_fp8_e4m3fn_scaled"], ["low_noise_v1.1_fp8_e4m3fn_scaled"], "quantization"),
        (["LowNoise-IQ4_XS", "Low-Noise-v1.0-Q4_K_M"], ["Low-Noise-v1.0-Q4_K_M"], "version"),
        (["Low-Noise-v1.0-Q8_0", "Low-Noise-v1.0-Q6_K"], ["Low-Noise-v1.0-Q6_K", "Low-Noise-v1.0-Q8_0"], None),
        (["Low-Noise-Lightning-Q4_K_M", "Low-Noise-Rapid-v1.1-Q4_K_M", "High-Noise-v1.0-Q4_K_M"], [], ""),
    ],
)
def test_names_may_differ_in_version_and_quantization(near, others, differs):
    path = Path("/x") / HIGH
    start = "Wan2.2-T2V-A14B-"
    files = [
        path,
        *(Path(f"/x/{start}{name}.gguf") for name in near),
        Path("/y") / f"{start}Low-Noise-v1.1-Q4_K_M.gguf",
    ]
    pair = pair_of(
        path, [*files, Path(f"/x/{start}Low-Noise-v1.1-Q4_K_M.txt"), Path("/x/Wan2.2-I2V-A14B-Low-Noise.gguf")]
    )
    assert [other.stem.removeprefix(start) for other in pair.others] == others
    assert pair.differs == (differs if differs is not None else "version and quantization")


@given(*[st.text("vq_.- 018km", max_size=12)] * 2, st.sampled_from(["high", "HIGH_Noise", "HighNoise"]))
def test_two_files_find_each_other_or_neither_does(before, after, word):
    high = Path("/x") / f"{before}_{word}_{after}.gguf"
    low = Path("/x") / f"{before}_low_{after[::-1]}.gguf"
    found = pair_of(high, [low, high]), pair_of(low, [low, high])
    assert [one is not None and one.is_high for one in found] == [True, False]
    assert [one.others for one in found] in ([(low,), (high,)], [(), ()])
    assert found[0].differs == found[1].differs


def test_where_several_fit_alike_all_are_named_with_the_option():
    near = [Path("/x/a_LOW_Q8_0.gguf"), Path("/x/a_LOW_Q6_K.gguf")]
    path = Path("/x/a_HIGH_Q4_0.gguf")
    with pytest.raises(CheckpointError, match=r"any of a_LOW_Q6_K.gguf, a_LOW_Q8_0.gguf; .* with --transformer-2"):
        the_other(pair_of(path, near), path)
    near = [path, path.with_name("a_HIGH_Q5_0.gguf")]
    with pytest.raises(CheckpointError, match=r"it with --transformer, this one with --transformer-2"):
        the_other(pair_of(Path("/x/a_LOW_F16.gguf"), near), Path("/x/a_LOW_F16.gguf"))


# --- files that are opened ---


@pytest.fixture
def pair(checkpoint_of, tmp_path):
    """A folder of single files, whose experts get the names that are asked for."""
    convert(open_checkpoint(checkpoint_of("two experts")), tmp_path, to="single-file")
    models = tmp_path / "diffusion_models"

    def rename(high, low):
        for noise, name in (("high", high), ("low", low)):
            (models / f"transformer_{noise}_noise.safetensors").rename(models / f"{name}.safetensors")
        return tmp_path

    return rename


def files_of(components):
    return [components[name].files[0].stem for name in ("transformer", "transformer_2")]


@pytest.mark.parametrize(
    "names",
    [
        ("wan-High-Noise-v1.1-bf16", "wan-Low-Noise-v1.0-fp8"),  # of another version, stored otherwise
        ("b_HIGH", "a_low_rapid"),  # of another name, before it in the alphabet
    ],
)
def test_the_only_two_experts_of_a_folder_are_a_pair_and_the_log_says_so(names, pair, caplog):
    with caplog.at_level(logging.INFO, "frameloom"):
        components = open_checkpoint(pair(*names)).components
    assert files_of(components) == list(names)
    assert f"{names[0]}.safetensors and {names[1]}.safetensors are taken for the two noise experts" in caplog.text


@pytest.mark.parametrize("given", [0, 1])
def test_an_expert_that_is_given_finds_the_other_of_its_model(given, pair, caplog):
    names = ("wan-High-Noise-v1.1-bf16", "wan-Low-Noise-v1.0-fp8")
    folder = pair(*names)
    parts = {"transformer": folder / "diffusion_models" / f"{names[given]}.safetensors"}
    parts |= {"vae": folder / "vae" / "vae.safetensors", "text_encoder": folder / "text_encoders" / "umt5.safetensors"}
    with caplog.at_level(logging.INFO, "frameloom"):
        components = open_checkpoint(None, parts=parts | {"tokenizer": folder / "tokenizer"}).components
    assert files_of(components) == list(names)
    assert (
        f"{names[1 - given]}.safetensors, of another version and quantization: no other name is nearer" in caplog.text
    )


def test_one_of_several_is_not_guessed_and_inspected_alone(pair, caplog):
    models = pair("wan_HIGH_fp16", "wan_LOW_fp8") / "diffusion_models"
    shutil.copyfile(models / "wan_LOW_fp8.safetensors", models / "wan_LOW_bf16.safetensors")
    high = models / "wan_HIGH_fp16.safetensors"
    with pytest.raises(CheckpointError, match=r"any of wan_LOW_bf16.safetensors, wan_LOW_fp8.safetensors"):
        open_checkpoint(None, parts={"transformer": high})
    with caplog.at_level(logging.WARNING, "frameloom"):
        assert open_parts(high).keys() == {"transformer"}
    assert "may be any of wan_LOW_bf16.safetensors and wan_LOW_fp8.safetensors" in caplog.text
    components = {"transformer": high, "transformer_2": models / "wan_LOW_bf16.safetensors"}
    with pytest.raises(CheckpointError, match="text encoder and tokenizer must be given too"):
        open_checkpoint(None, parts=components)


def test_two_models_are_no_pair(pair, checkpoint_of, tmp_path):
    models = pair("wan_HIGH", "other_LOW") / "diffusion_models"
    convert(open_checkpoint(checkpoint_of("image, two experts")), tmp_path / "image", to="single-file")
    image = tmp_path / "image" / "diffusion_models" / "transformer_low_noise.safetensors"
    image.rename(models / "other_LOW.safetensors")
    with pytest.raises(CheckpointError, match=r"two transformers, other_LOW.safetensors and wan_HIGH.safetensors"):
        open_checkpoint(models.parent)


# --- what they are called ---

T2V = "Wan 2.1 T2V 14B, or an expert of Wan 2.2 T2V A14B"


@pytest.mark.parametrize(
    ("model", "name", "what"),
    [
        (T2V, "wan2.2_t2v_high_noise_14B", "Wan 2.2 T2V A14B, high-noise expert by its name"),
        (T2V, "Wan2.2-T2V-A14B-LowNoise-Q4_K_M", "Wan 2.2 T2V A14B, low-noise expert by its name"),
        (T2V, "my_merge", T2V),
        (T2V, "wan2.1_t2v_14B_high", T2V),
        ("Wan 2.2 I2V A14B", "x_HIGH", "Wan 2.2 I2V A14B, high-noise expert by its name"),
        ("Wan 2.2 I2V A14B", "x", "Wan 2.2 I2V A14B"),
        *((one, "x_low", one) for one in ("Wan 2.1 T2V 1.3B", "Wan 2.1 I2V 14B", "Wan 2.2 TI2V 5B")),
    ],
)
def test_a_lone_expert_is_told_by_its_name_where_tensors_cannot_tell(model, name, what, tmp_path):
    shapes = published_transformer(model)
    entries = {key: {"dtype": "BF16", "shape": shape} for key, shape in shapes.items()}
    offset = 0
    for key, entry in entries.items():
        end = offset + 2 * math.prod(shapes[key])
        entry["data_offsets"], offset = [offset, end], end
    header = json.dumps(entries).encode()
    path = tmp_path / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + offset)  # a hole: no disk holds its zeros
    (part,) = frameloom.describe(path)["components"]
    assert part["what"] == what
