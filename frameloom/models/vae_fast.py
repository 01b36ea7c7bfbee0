"""Gives a WanVAE its fast kernels: which of the allowed ways each convolution is computed in, and why.

The choice is data (`VaeChoices`): made once by `choose`, installed into the loaded network by `install`, and into a
copy without weights when memory is planned.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from frameloom.attention.backend import shapes_alone
from frameloom.errors import RequestError
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_blocks import AttentionBlock, CausalConv3d, Kernel, Resample, RMSNorm
from frameloom.models.vae_rewrites import BANDS, BUFFERS, CHUNKS, REPEATS, TILE_ROWS, TILES, refuses_tiles
from frameloom.models.vae_state import BandState, Passage, Reach
from frameloom.models.wan_vae import WanVAE
from frameloom.ops import vae_rewrites as ops
from frameloom.ops.conv import DirectConv, PhaseUpsampledConv, PointwiseConv, UnfoldedConv, UpsampledConv
from frameloom.ops.norm_silu import norm_silu_native, norm_silu_tiled, refuses_native
from frameloom.ops.registry import Decision, Policy, Rewrite
from frameloom.ops.triton_norm_silu import norm_silu_triton, refuses_triton
from frameloom.ops.winograd import PlainWinogradConv, UpsampledWinogradConv, WinogradConv, bytes_at_points
from frameloom.platform.tuning import Tuner

Maker = Callable[[Tensor, Tensor | None], Kernel]
_MAKERS: Mapping[str, Maker] = MappingProxyType(
    {
        ops.CHANNELS_LAST.name: DirectConv,
        ops.POINTWISE.name: PointwiseConv,
        ops.UNFOLDED.name: UnfoldedConv,
        ops.WINOGRAD.name: WinogradConv,
        ops.WINOGRAD_PLAIN.name: PlainWinogradConv,
        ops.PHASES.name: PhaseUpsampledConv,
        ops.UPSAMPLED_WINOGRAD.name: UpsampledWinogradConv,
    }
)
# Dimensions of a weight from the slowest to the fastest, in the memory order its kernel computes with: a weight that
# lies so is used where it lies, any other is copied. Kernels that are not here compute with other numbers.
_ORDERS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        ops.CHANNELS_LAST.name: (0, 2, 3, 4, 1),
        ops.POINTWISE.name: (0, 2, 3, 4, 1),
        ops.UNFOLDED.name: (0, 3, 4, 2, 1),
    }
)
_AT_POINTS = (ops.WINOGRAD.name, ops.WINOGRAD_PLAIN.name, ops.UPSAMPLED_WINOGRAD.name)
_NORMS: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = MappingProxyType(
    {
        ops.NORM_SILU_NATIVE.name: norm_silu_native,
        ops.NORM_SILU_TRITON.name: norm_silu_triton,
        ops.NORM_SILU_TILED.name: norm_silu_tiled,
    }
)
_PICTURE = (30, 52)  # latent rows and columns of the picture that ways are measured on: 240x416 in most checkpoints
_MEASURED_ROWS = 16  # of a layer's picture; which way is fastest does not change with more


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeChoices:
    """The rewrite that each module is computed by, and the decisions that led there."""

    kernels: Mapping[str, str]
    norm: str | None
    channels_last: bool
    buffers: bool = True
    repeats: bool = True
    tiles: bool = False
    chunks: bool = True
    bands: bool = True
    always_chunks: bool = False  # the user named it: never one latent frame at a time where there are more
    always_bands: bool = False  # the user named it: never whole pictures
    num_short: int = 0  # layers that had no memory for Winograd's weights: where they have it, they round otherwise
    decisions: tuple[Decision, ...] = ()

    @property
    def passage(self) -> Passage:
        """One latent frame at a time, whole pictures, in the memory order of these kernels."""
        tile_rows = TILE_ROWS if self.tiles else None
        return Passage(channels_last=self.channels_last, tile_rows=tile_rows, buffers=self.buffers)


REFERENCE = VaeChoices(
    kernels=MappingProxyType({}),
    norm=None,
    channels_last=False,
    buffers=False,
    repeats=False,
    chunks=False,
    bands=False,
)


@torch.inference_mode()
def choose(vae: WanVAE, policy: Policy, tuner: Tuner, *, winograd_bytes: int | None = None) -> VaeChoices:
    """Which way each convolution and norm of `vae` is computed.

    `winograd_bytes` bounds the memory of weights evaluated at Winograd's points, of the encoder's and of the decoder's
    each. Raises RequestError for a rewrite that was insisted on and does not apply.
    """
    _refuse_rivals(policy)
    weight = next(vae.parameters())
    passing, told = _choose_passing(policy, weight)
    base = policy.refuses(ops.CHANNELS_LAST) or ops.CHANNELS_LAST.refuses(None, weight)
    base = base or (None if passing["buffers"] else f"it needs {BUFFERS.name}")
    if base is not None:
        others = [rewrite for rewrite in ops.OPERATIONS if rewrite is not ops.CHANNELS_LAST]
        told.append(policy.decide(ops.CHANNELS_LAST, base))
        told += [policy.decide(r, policy.refuses(r) or f"it needs {ops.CHANNELS_LAST.name}") for r in others]
        return VaeChoices(kernels={}, norm=None, channels_last=False, **passing, decisions=tuple(told))
    tile_rows = TILE_ROWS if passing["tiles"] else None
    kernels, num_short = _choose_kernels(vae, policy, tuner, winograd_bytes, tile_rows)
    norm, told_of_norm = _choose_norm(policy, weight)
    told += [*_tell(policy, kernels, weight), *told_of_norm]
    return VaeChoices(
        kernels=kernels, norm=norm, channels_last=True, **passing, num_short=num_short, decisions=tuple(told)
    )


def install(vae: WanVAE, choices: VaeChoices, made: Mapping[str, Kernel] = MappingProxyType({})) -> None:
    """Give every chosen module its kernel; a weight that the kernel holds in another form is let go.

    `made`: kernels by the names of their modules that were made of the same weights before.
    """
    modules = dict(vae.named_modules())
    for name, rewrite in choices.kernels.items():
        module = modules[name]
        assert isinstance(module, Resample | CausalConv3d)
        conv = convolution_of(module)
        module.kernel = made.get(name) or _MAKERS[rewrite](conv.weight, conv.bias)
        conv.register_parameter("weight", None)
    for module in modules.values():
        if isinstance(module, RMSNorm) and choices.norm is not None:
            module.fused = _NORMS[choices.norm]
        elif choices.channels_last and isinstance(module, nn.Conv2d) and _lies_otherwise(module.weight):
            copy = module.weight.detach().contiguous(memory_format=torch.channels_last)  # others may hold the weight
            module.weight = nn.Parameter(copy, requires_grad=module.weight.requires_grad)


def _lies_otherwise(weight_OCHW: Tensor | None) -> bool:
    return weight_OCHW is not None and not weight_OCHW.is_contiguous(memory_format=torch.channels_last)


def convolution_of(module: nn.Module) -> nn.Conv2d | nn.Conv3d:
    """The convolution that a module's kernel computes."""
    conv = module.conv if isinstance(module, Resample) else module
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    return conv


def memory_orders(vae: WanVAE, choices: VaeChoices) -> dict[str, tuple[int, ...]]:
    """How weights should lie, by their names, so that the kernels use them where they lie.

    Dimensions from the slowest to the fastest. Weights that are not named may lie as they like.
    """
    orders: dict[str, tuple[int, ...]] = {}
    for name, module in vae.named_modules():
        if (order := _ORDERS.get(choices.kernels.get(name, ""))) is not None:
            orders[f"{name}.weight"] = order
        elif choices.channels_last and isinstance(module, nn.Conv2d):
            orders[f"{name}.weight"] = (0, 2, 3, 1)
    upsamplers = [f"{name}.resample.1.weight" for name in choices.kernels if f"{name}.resample.1.weight" in orders]
    for name in upsamplers:  # their kernels make numbers of their own
        del orders[name]
    return orders


def of_other_numbers(choices: VaeChoices) -> list[str]:
    """Names of the modules whose kernels compute with other numbers than the weights, which they make of them."""
    return [name for name, rewrite in choices.kernels.items() if rewrite not in _ORDERS]


def without_weights(spec: VaeSpec, dtype: torch.dtype, choices: VaeChoices) -> WanVAE:
    """The same network with the same kernels on the meta device: it computes shapes and nothing else."""
    with on_meta():
        vae = WanVAE(spec).eval().to(dtype)
        install(vae, choices)
        prepare(vae)
    for module in vae.modules():
        if isinstance(module, AttentionBlock):
            module.attend = shapes_alone
    return vae


def prepare(part: nn.Module) -> None:
    """Bring the kernels of the encoder, the decoder or both into the form they compute with; else their first use does.

    Until then a kernel that changes the form of its weights holds the smaller one: call this before memory is planned.
    """
    for module in part.modules():
        if isinstance(module, CausalConv3d | Resample) and isinstance(module.kernel, _Prepares):
            module.kernel.prepare()


@runtime_checkable
class _Prepares(Protocol):
    def prepare(self) -> None: ...


def _choose_passing(policy: Policy, weight: Tensor) -> tuple[dict[str, bool], list[Decision]]:
    """Which ways to cut a video the planner may use."""
    told: list[Decision] = []
    allowed: dict[str, bool] = {}
    for key, rewrite, reason in (
        ("buffers", BUFFERS, "it applies"),
        ("repeats", REPEATS, "where frames do not change"),
        ("tiles", TILES, "it applies"),
        ("chunks", CHUNKS, "where memory allows"),
        ("bands", BANDS, "where memory is short, and on a CPU where pictures are large"),
    ):
        refusal = policy.refuses(rewrite) or (None if allowed.get("buffers", True) else f"it needs {BUFFERS.name}")
        refusal = refusal or (refuses_tiles(weight) if rewrite is TILES else None)
        allowed[key] = refusal is None
        told.append(policy.decide(rewrite, refusal, "asked for by name" if policy.insists(rewrite) else reason))
    return allowed | {"always_chunks": policy.insists(CHUNKS), "always_bands": policy.insists(BANDS)}, told


_RIVALS = (
    (ops.UNFOLDED, ops.WINOGRAD, ops.WINOGRAD_PLAIN),
    (ops.PHASES, ops.UPSAMPLED_WINOGRAD),
    (ops.NORM_SILU_NATIVE, ops.NORM_SILU_TRITON, ops.NORM_SILU_TILED),
)


def _refuse_rivals(policy: Policy) -> None:
    """Raise RequestError where two rewrites were asked for by name that compute the same layers."""
    for rivals in _RIVALS:
        named = [rewrite.name for rewrite in rivals if policy.insists(rewrite)]
        if len(named) > 1:
            raise RequestError(f"rewrites {' and '.join(named)} compute the same layers; ask for one of them")


def _choose_kernels(
    vae: WanVAE, policy: Policy, tuner: Tuner, winograd_bytes: int | None, tile_rows: int | None
) -> tuple[dict[str, str], int]:
    """The rewrite of each module, and how many had no memory for Winograd's."""
    limit = float("inf") if winograd_bytes is None else winograd_bytes
    left = {"encoder": limit, "decoder": limit}
    chosen: dict[str, str] = {}
    num_short = 0
    # Where Winograd's weights do not all fit, the layers with the most pixels gain the most per byte.
    by_pixels = sorted(_inputs(vae, tuner).items(), key=lambda item: -item[1][1][2:].numel())
    for name, (module, shape, pad_rows) in by_pixels:
        conv = convolution_of(module)
        half = name.partition(".")[0]
        winograd = bytes_at_points(conv.weight)
        fits = half in left and winograd <= left[half]
        ways = _ways(module, conv.weight, policy, allow_winograd=fits)
        if not fits and half in left and ways != _ways(module, conv.weight, policy, allow_winograd=True):
            num_short += 1
        if not ways:
            continue
        key = f"{conv.in_channels}>{conv.out_channels} {tuple(conv.kernel_size)} {tuple(shape)} {conv.weight.dtype}"
        prepare = functools.partial(_runs, conv, shape, pad_rows, ways, tile_rows)
        best = ways[0] if len(ways) == 1 else tuner.best(key, ways, prepare)
        if best in _AT_POINTS:
            left[half] -= winograd
        if best in _MAKERS:
            chosen[name] = best
    tuner.save()
    return chosen, num_short


_PLAIN = "plain"  # of an upsampler: doubling and convolution one after the other


def _ways(module: nn.Module, weight: Tensor, policy: Policy, *, allow_winograd: bool) -> list[str]:
    """Names of the rewrites that may compute a module, for the tuner; the one that was insisted on, alone.

    A matrix product sums a row of the picture in the same order whatever the height of the band: where there is one
    that is as fast as any, nothing else is tried.
    """

    def able(*candidates: Rewrite) -> list[str]:
        allowed = [r for r in candidates if policy.refuses(r) is None and r.refuses(None, weight) is None]
        insisted = [r.name for r in allowed if policy.insists(r) and r is not ops.CHANNELS_LAST]
        return insisted[:1] or [r.name for r in allowed]

    at_points = [ops.WINOGRAD, ops.WINOGRAD_PLAIN] if allow_winograd else []
    if isinstance(module, Resample):
        fixed = [] if policy.insists(ops.PHASES) or not allow_winograd else able(ops.UPSAMPLED_WINOGRAD)
        return fixed or [*able(ops.PHASES), *([] if policy.insists(ops.PHASES) else [_PLAIN])]
    return able(ops.POINTWISE) or able(ops.CHANNELS_LAST, ops.UNFOLDED, *at_points)


def _runs(
    conv: nn.Conv2d | nn.Conv3d, shape: torch.Size, pad_rows: int, ways: list[str], tile_rows: int | None
) -> dict[str, Callable[[], object]]:
    """Each way to compute a convolution, ready to run on random input."""
    batch, channels, frames, rows, width = shape
    size = (batch, frames, min(rows, _MEASURED_ROWS), width, channels)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(conv.weight).permute(0, 4, 1, 2, 3)
    makers: dict[str, Maker] = {**_MAKERS, _PLAIN: UpsampledConv}
    state = BandState(tile_rows=tile_rows)

    def run(kernel: Kernel) -> Tensor:
        reach = Reach(conv.kernel_size[-2], 1, pad_rows, pad_rows, kernel.tile_rows)
        return state.convolve(conv, x, lambda x, pad: kernel(x, pad.above), history=0, reach=reach)

    return {way: functools.partial(run, makers[way](conv.weight, conv.bias)) for way in ways}


def _inputs(vae: WanVAE, tuner: Tuner) -> dict[str, tuple[nn.Module, torch.Size, int]]:
    """Every convolution that may be computed otherwise, and the input it has in a chunk of a middling picture.

    Found once by a network without weights, and kept: even that takes a while, as much of torch is imported for it.
    """
    modules = dict(vae.named_modules())
    dtype = next(vae.parameters()).dtype
    key = f"inputs of a VAE {hashlib.sha256(repr(vae.spec).encode()).hexdigest()[:16]} {dtype}"
    seen = tuner.recall(key, lambda: _record_inputs(vae.spec, dtype), lambda found: _is_record(found, modules))
    return {name: (modules[name], torch.Size(shape), pad_rows) for name, (shape, pad_rows) in seen.items()}


def _is_record(found: Any, modules: Mapping[str, nn.Module]) -> bool:
    """Whether something that was read is what `_record_inputs` writes for a network of these modules."""
    wanted = {name for name, module in modules.items() if isinstance(module, CausalConv3d) or _doubles(module)}
    if not isinstance(found, dict) or found.keys() != wanted:
        return False
    try:
        return all(len(torch.Size(shape)) == 5 and isinstance(rows, int) for shape, rows in found.values())
    except (TypeError, ValueError):
        return False


def _doubles(module: nn.Module) -> bool:
    return isinstance(module, Resample) and module.mode.startswith("upsample")


def _record_inputs(spec: VaeSpec, dtype: torch.dtype) -> dict[str, tuple[list[int], int]]:
    twin = without_weights(spec, dtype, REFERENCE)
    seen: dict[str, tuple[list[int], int]] = {}  # written as JSON
    for name, module in twin.named_modules():
        if isinstance(module, CausalConv3d):
            module.kernel = _Recorder(seen, name, DirectConv(module.weight, module.bias))
        elif isinstance(module, Resample) and _doubles(module):
            module.kernel = _Recorder(seen, name, UpsampledConv(module.conv.weight, module.conv.bias))
    rows, columns = _PICTURE
    state = BandState()
    for frames in (1, 1):  # the first and a later one
        twin.decode_chunk(torch.empty(1, spec.z_dim, frames, rows, columns, device="meta", dtype=dtype), state)
    state = BandState()
    height, width = rows * spec.spatial_scale, columns * spec.spatial_scale
    for frames in (1, spec.temporal_scale):
        twin.encode_chunk(torch.empty(1, spec.given_channels, frames, height, width, device="meta", dtype=dtype), state)
    return seen


@dataclass(frozen=True, slots=True)
class _Recorder:
    """A kernel that notes what it is given."""

    seen: dict[str, tuple[list[int], int]]
    name: str
    kernel: Kernel
    tile_rows: int = 1

    def __call__(self, x_BCTHW: Tensor, pad_rows: int) -> Tensor:
        """As the kernel."""
        self.seen[self.name] = (list(x_BCTHW.shape), pad_rows)
        return self.kernel(x_BCTHW, pad_rows)


def _choose_norm(policy: Policy, weight: Tensor) -> tuple[str | None, list[Decision]]:
    """The one that was insisted on, else a compiled pass where there is one, else the tiled one, else the plain."""
    reasons = {
        rewrite: policy.refuses(rewrite)
        for rewrite in (ops.NORM_SILU_NATIVE, ops.NORM_SILU_TRITON, ops.NORM_SILU_TILED)
    }
    reasons[ops.NORM_SILU_NATIVE] = reasons[ops.NORM_SILU_NATIVE] or refuses_native(weight)
    reasons[ops.NORM_SILU_TRITON] = reasons[ops.NORM_SILU_TRITON] or refuses_triton(weight)
    if weight.device.type == "cpu" and not policy.insists(ops.NORM_SILU_TRITON):
        reasons[ops.NORM_SILU_TRITON] = reasons[ops.NORM_SILU_TRITON] or "Triton's interpreter is for tests"
    elif weight.device.type != "cpu":
        reasons[ops.NORM_SILU_TILED] = reasons[ops.NORM_SILU_TILED] or "it is for the caches of a CPU"
    able = [rewrite for rewrite, reason in reasons.items() if reason is None]
    chosen = next((rewrite for rewrite in able if policy.insists(rewrite)), able[0] if able else None)
    told = []
    for rewrite, reason in reasons.items():
        if rewrite is chosen:
            told.append(Decision(name=rewrite.name, used=True, reason="it applies"))
        else:
            told.append(policy.decide(rewrite, reason or f"{chosen.name if chosen else ''} is used instead"))
    return chosen.name if chosen else None, told


def _tell(policy: Policy, kernels: Mapping[str, str], weight: Tensor) -> list[Decision]:
    """One decision per rewrite of convolutions."""
    counts = Counter(kernels.values())
    told = [Decision(name=ops.CHANNELS_LAST.name, used=True, reason="the layout of all activations")]
    upsamplers = (ops.PHASES, ops.UPSAMPLED_WINOGRAD)
    for rewrite in (ops.POINTWISE, ops.UNFOLDED, ops.WINOGRAD, ops.WINOGRAD_PLAIN, *upsamplers):
        if count := counts[rewrite.name]:
            told.append(Decision(name=rewrite.name, used=True, reason=f"{count} layers"))
        else:
            refusal = policy.refuses(rewrite) or rewrite.refuses(
                None, weight.new_empty((1, 1, 3, 3) if rewrite in upsamplers else (1, 1, 3, 3, 3))
            )
            other = "slower here in every layer, or no memory for it"
            if rewrite is ops.PHASES and counts[ops.UPSAMPLED_WINOGRAD.name]:
                other = f"{ops.UPSAMPLED_WINOGRAD.name} is used instead, with fewer multiplications"
            told.append(policy.decide(rewrite, refusal or other))
    return told
