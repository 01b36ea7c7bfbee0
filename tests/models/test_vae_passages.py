"""The VAE cut into chunks of frames and bands of rows: the same pictures, and what happens when a row is lost."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_wan_vae import KINDS, make_pair, relative_error

from frameloom.errors import RequestError
from frameloom.models.vae_blocks import AttentionBlock, CausalConv3d
from frameloom.models.vae_fast import choose, install
from frameloom.models.vae_state import BandState, Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.ops.winograd import bytes_at_points
from frameloom.platform.tuning import Tuner


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder where a choice that one test has made by timing is there for the next."""
    return tmp_path_factory.mktemp("choices")


def fast_twin(kind: str, measured, **forced: bool):
    reference, ours = make_pair(kind)
    choices = choose(ours, Policy(forced=forced), Tuner(torch.device("cpu"), measured))
    install(ours, choices)
    return reference, ours, choices


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_bands_of_rows_decode_the_same_pixels(kind: str, bands: int) -> None:
    """In float64 the difference is rounding at 1e-16; in float32 the library sums in other orders for other heights."""
    reference, ours = make_pair(kind)
    z = torch.randn(1, ours.spec.z_dim, 3, 7, 5)
    passage = Passage(rows=-(-7 // bands))
    assert relative_error(ours.decode(z, passage), reference.decode(z).sample) <= 1e-5
    ours, z = ours.double(), z.double()
    assert relative_error(ours.decode(z, passage), ours.decode(z)) <= 1e-14


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_length_with_fast_kernels_equal_diffusers(kind: str, steps: int, measured) -> None:
    reference, ours, choices = fast_twin(kind, measured)
    z = torch.randn(1, ours.spec.z_dim, 10, 3, 5)
    passage = Passage(steps=steps, rows=2 if steps % 2 else None, channels_last=choices.channels_last)
    assert relative_error(ours.decode(z, passage), reference.decode(z).sample) <= 1e-5


WAYS = ["vae.conv_winograd", "vae.conv_winograd_plain", "vae.conv3d_unfold", "vae.upsample_phases"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_convolution_in_bands_and_whole(kind: str, way: str, measured) -> None:
    reference, ours, choices = fast_twin(kind, measured, **{way: True})
    assert way in choices.kernels.values()
    z = torch.randn(2, ours.spec.z_dim, 3, 5, 16)
    whole = ours.decode(z, Passage(steps=2, channels_last=True))
    assert relative_error(whole, reference.decode(z).sample) <= 1e-5
    for rows in (9, 2, 1):
        assert relative_error(ours.decode(z, Passage(steps=2, rows=rows, channels_last=True)), whole) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "forced", [{way: True} for way in WAYS] + [{"vae.channels_last": False}, dict.fromkeys(WAYS, False)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_in_tiles_of_rows_bands_of_any_height_have_the_bits_of_the_whole(kind, forced, dtype, measured) -> None:
    if dtype == torch.bfloat16 and forced.get("vae.upsample_phases"):
        pytest.skip("that one is for float32")
    ours = make_pair(kind)[1].to(dtype)
    choices = choose(ours, Policy(forced=forced), Tuner(torch.device("cpu"), measured))
    install(ours, choices)
    assert choices.passage.tile_rows == 4
    z = torch.randn(1, ours.spec.z_dim, 2, 7, 5, dtype=dtype)
    whole = ours.decode(z, choices.passage)
    for rows in (1, 3, 6, 17) if dtype == torch.float32 else (3,):
        assert torch.equal(ours.decode(z, replace(choices.passage, rows=rows)), whole)


@pytest.fixture
def threads_as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_the_bits_of_the_attention(dtype, threads_as_before) -> None:
    """Of a library's convolution it does, from 384 channels and 104 columns on: those of 480x832."""
    torch.manual_seed(0)
    block = AttentionBlock(384).to(dtype)
    x = torch.randn(1, 384, 1, 8, 104).to(dtype, memory_format=torch.channels_last_3d)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(block(x, BandState(tile_rows=4)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 35])
@pytest.mark.parametrize("kind", KINDS)
def test_bands_of_rows_encode_the_same_latents(kind: str, rows: int, measured) -> None:
    reference, ours, choices = fast_twin(kind, measured)
    scale = ours.spec.spatial_scale
    x = torch.rand(1, 3, 9, 3 * scale, 2 * scale) * 2 - 1
    expected = reference.encode(x).latent_dist.parameters
    passage = Passage(steps=2, rows=rows, channels_last=choices.channels_last)
    assert relative_error(ours.encode(x, passage), expected) <= 1e-5


class ForgetfulState(BandState):
    """Loses of each sample of a batch one row that one layer keeps for the next band: of every layer the first `rows`.

    `lost`: the samples of whose row anything was there; layer number `sample // rows`, row `sample % rows`.
    """

    def __init__(self, lost_rows: int = 0) -> None:
        super().__init__(rows=3, channels_last=False)
        self.lost_rows = lost_rows
        self.keys: dict[object, int] = {}
        self.lost: set[int] = set()

    def _keep(self, key: object, x_BCTHW: torch.Tensor) -> None:
        number = self.keys.setdefault(key, len(self.keys))
        x_BCTHW = x_BCTHW.clone()
        for row in range(min(self.lost_rows, x_BCTHW.shape[3])):
            sample = number * self.lost_rows + row
            if x_BCTHW[sample, :, :, row].any():
                self.lost.add(sample)
            x_BCTHW[sample, :, :, row] = 0
        super()._keep(key, x_BCTHW)

    def decoded_without(self, ours: WanVAE, z: torch.Tensor, layers: int) -> torch.Tensor:
        """A decode of `z`, which is one sample, for each row that is lost."""
        return ours.decode_chunk(z.expand(layers * self.lost_rows, -1, -1, -1, -1), self)


def tall_latents(ours: WanVAE) -> torch.Tensor:
    """In float64, so that rounding hides nothing; as tall as the deepest layer needs to keep rows."""
    return torch.randn(1, ours.spec.z_dim, 1, 27, 1, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_that_is_kept_can_be_missed(kind: str) -> None:
    ours = make_pair(kind)[1].double()
    z, counting, state = tall_latents(ours), ForgetfulState(), ForgetfulState(2)
    whole = ours.decode_chunk(z, counting)
    assert relative_error(whole, ours.decode(z)) <= 1e-14
    layers = len(counting.keys)
    broken = state.decoded_without(ours, z, layers)
    unseen = [sample for sample in state.lost if relative_error(broken[sample : sample + 1], whole) <= 1e-9]
    assert not unseen, "layers and rows that were lost unseen"
    assert {sample // 2 for sample in state.lost} == set(range(layers))


class InTiles:
    """A convolution in float64 whose rows are computed four at a time, as Winograd's are."""

    tile_rows = 4

    def __init__(self, conv: CausalConv3d) -> None:
        self.conv = conv

    def __call__(self, x: torch.Tensor, pad_rows: int) -> torch.Tensor:
        return F.conv3d(x, self.conv.weight, self.conv.bias, padding=(0, pad_rows, self.conv.kernel_size[2] // 2))


def test_no_row_that_waits_for_its_tile_can_be_missed() -> None:
    ours = make_pair("2.1 three stages")[1].double()
    z, counting, state = tall_latents(ours), ForgetfulState(), ForgetfulState(6)
    whole = ours.decode(z)
    for module in ours.modules():
        if isinstance(module, CausalConv3d) and module.kernel_size[1] == 3:
            module.kernel = InTiles(module)
    assert relative_error(ours.decode_chunk(z, counting), whole) <= 1e-14
    layers = len(counting.keys)
    broken = state.decoded_without(ours, z, layers)
    unseen = [sample for sample in state.lost if relative_error(broken[sample : sample + 1], whole) <= 1e-9]
    assert not unseen, "layers and rows that were lost unseen"
    assert len(state.lost) > 3 * layers  # more rows wait than a convolution alone would keep


@pytest.mark.parametrize(
    "rivals",
    [
        ("conv3d_unfold", "conv_winograd"),
        ("upsample_phases", "upsample_winograd"),
        ("norm_silu_native", "norm_silu_tiled"),
    ],
)
def test_two_ways_for_the_same_layers_cannot_both_be_asked_for(rivals, measured) -> None:
    _, ours = make_pair("2.1")
    policy = Policy(forced={f"vae.{name}": True for name in rivals})
    with pytest.raises(RequestError, match="compute the same layers; ask for one of them"):
        choose(ours, policy, Tuner(torch.device("cpu"), measured))


@pytest.mark.parametrize("way", ["vae.norm_silu_triton", "vae.norm_silu_tiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_norm_that_is_asked_for_decodes_what_diffusers_does(kind: str, way: str, measured) -> None:
    reference, ours, choices = fast_twin(kind, measured, **{way: True})
    assert choices.norm == way
    z = torch.randn(1, ours.spec.z_dim, 3, 3, 5)
    passage = Passage(steps=2, channels_last=choices.channels_last)
    assert relative_error(ours.decode(z, passage), reference.decode(z).sample) <= 1e-5


def test_a_cpu_computes_norms_through_no_interpreter_unasked(measured) -> None:
    _, ours = make_pair("2.1")
    choices = choose(ours.bfloat16(), Policy(), Tuner(torch.device("cpu"), measured))
    told = {decision.name: decision.used for decision in choices.decisions if "norm_silu" in decision.name}
    assert told == {"vae.norm_silu_native": False, "vae.norm_silu_triton": False, "vae.norm_silu_tiled": True}


def test_a_forced_way_that_does_not_apply_is_an_error(measured) -> None:
    _, ours = make_pair("2.1")
    ours = ours.double()
    with pytest.raises(RequestError, match=r"vae.conv_winograd_plain=on is not possible here: it computes in float32"):
        choose(ours, Policy(forced={"vae.conv_winograd_plain": True}), Tuner(torch.device("cpu"), measured))


def test_winograd_goes_to_the_layers_with_most_pixels_where_memory_is_short(measured) -> None:
    _, ours = make_pair("2.1")
    policy, tuner = Policy(forced={"vae.conv_winograd_plain": True}), Tuner(torch.device("cpu"), measured)
    every = winograd_layers(choose(ours, policy, tuner))
    sizes = {name: bytes_at_points(ours.get_submodule(name).weight) for name in every if name.startswith("decoder.")}
    limit = sum(sizes.values()) // 4
    chosen = winograd_layers(choose(ours, policy, tuner, winograd_bytes=limit))
    scarce = {name for name in chosen if name.startswith("decoder.")}
    assert {name for name in sizes if name.startswith("decoder.up_blocks.3.resnets")} <= scarce
    assert not any(name.startswith("decoder.mid_block") for name in scarce)
    assert sum(sizes[name] for name in scarce) <= limit
    assert chosen - scarce, "the encoder has a limit of its own"


def winograd_layers(choices) -> set[str]:
    return {name for name, way in choices.kernels.items() if way == "vae.conv_winograd_plain"}


@pytest.mark.parametrize("damage", ["x", {}, {"decoder.conv_in": [[1, 2], 3]}, None])
def test_damaged_notes_of_the_layers_are_made_anew(damage, tmp_path) -> None:
    _, ours = make_pair("2.1")
    tuner = Tuner(torch.device("cpu"), tmp_path)
    expected = choose(ours, Policy(), tuner)
    (notes,) = tmp_path.glob("choices-*.json")
    kept = json.loads(notes.read_text())
    (key,) = [key for key in kept if key.startswith("inputs of a VAE")]
    notes.write_text(json.dumps({**kept, key: damage}))
    assert choose(ours, Policy(), Tuner(torch.device("cpu"), tmp_path)) == expected
