"""Plans how a video passes through the VAE: how many frames at a time, in how many bands, under a memory budget."""

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from frameloom.errors import RequestError
from frameloom.memory.meter import amount, peak_bytes
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_fast import VaeChoices, without_weights
from frameloom.models.vae_state import Passage
from frameloom.models.wan_vae import WanVAE
from frameloom.platform.device import free_memory_bytes
from frameloom.settings import LOGGER_NAME

log = logging.getLogger(LOGGER_NAME)

_OVERHEAD = 1.2  # what the prediction does not see; up to 1.2 was measured (docs/log.md)
_SHARE_OF_FREE = 0.6  # of the free memory that a plan may take when nobody set a budget
_CHUNKS = (4, 2, 1)  # latent frames at a time
# On a CPU whole pictures are slower than bands: near the caches, and in blocks that the C library keeps when they are
# freed (up to 32 MB; larger ones come fresh from the system, page by page). docs/log.md has the figures.
# As long as it can be, the same number of frames pass at a time: then memory decides on the bands, and not on the bits.
_CPU_CHUNKS = (2,)
_CPU_BAND_BYTES = 32_000_000  # of the largest activation
_NARROWEST = 8  # rows of a band: the past of the video takes most of the memory then, 1 row would save 3 %
_ACTIVATIONS_AT_MOST = 64  # of the largest: what remembers the past of the video counted
_WORKSPACE_BYTES = 128_000_000
_SHARE_WITHOUT_COUNTING = 0.5  # of the budget: what surely takes no more than that is not counted
_FRAME_COPIES = 4  # of a chunk's frames that exist while they are rounded to bytes


@dataclass(frozen=True, kw_only=True)  # no slots: `_twin` is kept
class VaePlanner:
    """Finds the fastest way for a picture that fits the budget.

    `budget_bytes` None: a share of what is free, where so many `processes` take one each.
    """

    spec: VaeSpec
    dtype: torch.dtype
    choices: VaeChoices
    device: torch.device
    budget_bytes: int | None = None
    processes: int = 1

    def decode(self, shape_BZTHW: tuple[int, ...]) -> Iterator[Passage]:
        """Passages for latents of this shape, the best first; the next ones are for when memory ran out after all.

        Raises RequestError if not even the narrowest band fits the budget.
        """
        batch, channels, frames, height, width = shape_BZTHW
        return self._passages((batch, channels, height, width), frames - 1, encode=False)

    def encode(self, shape_BCTHW: tuple[int, ...]) -> Iterator[Passage]:
        """The same for frames (B, 3, T, H, W)."""
        batch, channels, frames, height, width = shape_BCTHW
        steps = (frames - 1) // self.spec.temporal_scale
        return self._passages((batch, channels, height, width), steps, encode=True)

    def ways(self, shape_BCTHW: tuple[int, ...], *, encode: bool = False) -> Iterator[Passage]:
        """All passages for latents, or for frames, the fastest first, whatever they take."""
        frames, height, width = shape_BCTHW[2:]
        steps = (frames - 1) // self.spec.temporal_scale if encode else frames - 1
        scale = 1 if encode else self.spec.spatial_scale
        return self._candidates(steps, height * scale, width * scale)

    def needed(
        self, picture_BCHW: tuple[int, int, int, int], steps: int, passage: Passage, *, encode: bool = False
    ) -> int:
        """Bytes that a passage takes besides the weights; `steps` is the number of latent frames after the first."""
        return round(_OVERHEAD * self.counted(picture_BCHW, steps, passage, encode=encode))

    def counted(
        self, picture_BCHW: tuple[int, int, int, int], steps: int, passage: Passage, *, encode: bool = False
    ) -> int:
        """Bytes of all tensors that a passage has at a time; no allocator's rounding, no workspaces."""
        batch, channels, height, width = picture_BCHW
        pass_on = self._twin.encode_chunk if encode else self._twin.decode_chunk  # made here: its weights do not count

        def run() -> None:
            state = passage.state()
            later = min(passage.steps, max(1, steps)) * (self.spec.temporal_scale if encode else 1)
            for count in (1, later, later)[: 1 + min(steps, 2 if passage.repeats else 1)]:
                x = torch.empty((batch, channels, count, height, width), device="meta", dtype=self.dtype)
                out = pass_on(x, state)
                out.new_empty(_FRAME_COPIES, *out.shape)

        with torch.inference_mode():
            return peak_bytes(run)

    def held_bytes(self, *, encodes: bool) -> int:
        """Of the weights, as the kernels of the decoder hold them and, where it `encodes`, those of the encoder."""
        with on_meta():
            plain = WanVAE(self.spec)
        encoder = _bytes_in(self._twin.encoder) if encodes else self.dtype.itemsize * _numbers_in(plain.encoder)
        rest = _numbers_in(plain) - _numbers_in(plain.encoder) - _numbers_in(plain.decoder)
        return encoder + _bytes_in(self._twin.decoder) + self.dtype.itemsize * rest

    @functools.cached_property
    def _twin(self) -> WanVAE:
        return without_weights(self.spec, self.dtype, self.choices)

    def _passages(self, picture_BCHW: tuple[int, int, int, int], steps: int, *, encode: bool) -> Iterator[Passage]:
        batch, _, height, width = picture_BCHW
        what = f"the VAE on {width}x{height}" + (" pixels" if encode else " latents")
        budget, whose = self._budget()
        scale = 1 if encode else self.spec.spatial_scale
        at_most = functools.partial(self._at_most, pixels=batch * height * width * scale**2)

        def bytes_of(passage: Passage) -> int:
            surely = at_most(passage)
            if surely <= _SHARE_WITHOUT_COUNTING * budget:
                return surely
            return self.needed(picture_BCHW, steps, passage, encode=encode)

        for chosen in self._candidates(steps, height * scale, width * scale):
            takes = bytes_of(chosen)
            if takes <= budget:
                break
        if takes > budget:
            raise RequestError(
                f"{what} needs at least {amount(takes)} besides its weights, and {whose} is {amount(budget)}; "
                f"allow {takes} bytes or more, or ask for a smaller picture"
            )
        may_repeat = encode and self.choices.repeats and not self.choices.always_chunks
        if may_repeat and bytes_of(replace(chosen, steps=1, repeats=True)) <= budget:
            chosen = replace(chosen, repeats=True)
        known = "at most" if takes == at_most(chosen) else "about"
        log.info("%s: %s; %s %s, %s is %s", what, chosen, known, amount(takes), whose, amount(budget))
        keeps = self.device.type == "cpu" or self.choices.always_chunks
        fewer = chosen if keeps else replace(chosen, steps=1)
        return itertools.chain([chosen], self._in_narrower_bands(fewer, chosen.rows or height * scale))

    def _at_most(self, passage: Passage, pixels: int) -> int:
        """Bytes that a passage surely does not exceed; `needed` is nearer, and takes a second to make."""
        spec = self.spec
        channels = max(spec.base_dim, spec.decoder_base_dim or 0)
        frames, cells = spec.temporal_scale * passage.steps, pixels // (spec.patch_size or 1) ** 2
        activation = channels * frames * cells * max(4, self.dtype.itemsize)
        blocks = 4 * 4 * 36 * (channels * max(spec.dim_mult)) ** 2  # what Winograd's kernels work on at a time
        return _ACTIVATIONS_AT_MOST * activation + _WORKSPACE_BYTES + blocks

    def _candidates(self, steps: int, height: int, width: int) -> Iterator[Passage]:
        """Ways for a picture of so many pixels, the fastest first."""
        plain, rows = self.choices.passage, None
        chunks: Sequence[int] = _CPU_CHUNKS if self.device.type == "cpu" else _CHUNKS
        if not self.choices.chunks:
            chunks = (1,)
        elif self.choices.always_chunks:
            chunks = [chunk for chunk in chunks if chunk > 1]
        if self.choices.bands and self.device.type == "cpu":
            widest = self._cpu_rows(width, chunks[0])
            rows = None if widest >= height else widest
        if self.choices.always_bands and rows is None:
            rows = -(-height // 2)
        fitting = [chunk for chunk in chunks if chunk <= max(1, steps)] or [max(1, steps)]
        yield from (replace(plain, steps=chunk, rows=rows) for chunk in fitting)
        yield from self._in_narrower_bands(replace(plain, steps=fitting[-1]), rows or height)

    def _in_narrower_bands(self, passage: Passage, rows: int) -> Iterator[Passage]:
        if not self.choices.bands:
            return iter(())
        return _narrower(passage, rows, may_shorten=not self.choices.always_chunks)

    def _cpu_rows(self, width: int, chunk: int) -> int:
        """Rows of a band whose largest activation has _CPU_BAND_BYTES; a multiple of four, as Winograd's tiles are."""
        spec = self.spec
        channels = max(spec.base_dim, spec.decoder_base_dim or 0)
        per_row = channels * chunk * spec.temporal_scale * (width // (spec.patch_size or 1)) * self.dtype.itemsize
        return max(_NARROWEST, _CPU_BAND_BYTES // max(1, per_row) // 4 * 4)

    def _budget(self) -> tuple[int, str]:
        if self.budget_bytes is not None:
            return self.budget_bytes, "the budget"
        return round(
            _SHARE_OF_FREE * free_memory_bytes(self.device)
        ) // self.processes, "what may be used of the free memory"


def _numbers_in(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _bytes_in(part: nn.Module) -> int:
    """Of parameters, and of what kernels hold instead of them."""
    kernels = [vars(kernel) for module in part.modules() if (kernel := getattr(module, "kernel", None)) is not None]
    held = [value for fields in kernels for value in fields.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*part.parameters(), *held))


def _narrower(passage: Passage, rows: int, *, may_shorten: bool) -> Iterator[Passage]:
    """Half the band, and half of that; as many latent frames at a time, and in the end one where that is allowed."""
    while rows > _NARROWEST:
        rows = max(_NARROWEST, -(-rows // 2))
        yield replace(passage, rows=rows)
    if passage.steps > 1 and may_shorten:
        yield replace(passage, steps=1, rows=rows)
