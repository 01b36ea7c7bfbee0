"""Plans the steps of a video: whether the predictions with and without the prompt pass the transformer in one batch."""

import functools
import re
from dataclasses import dataclass, replace

import torch

from frameloom.memory.meter import peak_bytes
from frameloom.memory.stream import block_by_block
from frameloom.models.adapters import Adapter, Adapters
from frameloom.models.adapters_beside import attach
from frameloom.models.dit_fast import DitChoices, LoopChoices, without_weights
from frameloom.models.spec import TransformerSpec
from frameloom.models.vace import under_empty_control
from frameloom.models.wan_dit import WanDiT
from frameloom.platform.device import free_memory_bytes

_OVERHEAD = 1.1  # workspaces of the libraries and the allocator's rounding, which the prediction does not see
_SHARE_OF_FREE = 0.6
_TEXT_TOKENS = 512
_FEW_TOKENS = 1024  # on a CPU: so many are over before the next operation has been looked up
_BLOCK = re.compile(r"((?:vace_)?blocks\.)(\d+)(\..+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlanner:
    """Says how the steps of a video are computed: what is allowed, and of that what the memory has room for.

    `insisted`: the batch of both branches was asked for by name. `plain_bytes`: of the quantized weights that are plain
    at a time. `experts`: the networks, for what is computed beside their weights. `by_block`: all branches pass a block
    before the next one comes.
    """

    spec: TransformerSpec
    dtype: torch.dtype
    choices: DitChoices
    device: torch.device
    insisted: bool = False
    plain_bytes: int = 0
    experts: tuple[WanDiT, ...] = ()
    by_block: bool = False

    def loop(self, latents_BCTHW: tuple[int, ...], *, guided: bool) -> tuple[LoopChoices, str]:
        """The way, and why: with guidance, both branches in one batch or one after the other."""
        if not guided:
            return self.choices.loop, "one branch: there is no guidance"
        batched, why = self._batches(latents_BCTHW)
        return replace(self.choices.loop, guidance_batched=batched), why

    def _batches(self, latents_BCTHW: tuple[int, ...]) -> tuple[bool, str]:
        """By the memory that is free; on a CPU, where a batch is no faster but for very small videos, by the size."""
        if not self.choices.loop.guidance_batched:
            return False, "one branch after the other: a batch is not allowed"
        if self.insisted:
            return True, "both branches in one batch: asked for"
        batch, _, *cells = latents_BCTHW
        tokens = batch * functools.reduce(int.__mul__, cells) // self.spec.patch_volume
        if self.device.type == "cpu":
            few = tokens <= _FEW_TOKENS
            return few, f"both branches in one batch: {tokens} tokens" if few else "one branch after the other on a CPU"
        needed, free = self.needed(latents_BCTHW), free_memory_bytes(self.device)
        fits = needed <= _SHARE_OF_FREE * free
        way = "both branches in one batch" if fits else "one branch after the other"
        return fits, f"{way}: a batch takes about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"

    def needed(self, latents_BCTHW: tuple[int, ...]) -> int:
        """Bytes of a step with both branches in one batch, besides the weights and the keys of other blocks.

        Adapters are counted as they are attached now: not their numbers, which have their memory already, but what is
        computed beside the weights.
        """
        return round(_OVERHEAD * self.counted(latents_BCTHW, branches=2, batched=True)) + self.plain_bytes

    def counted(
        self, latents_BCTHW: tuple[int, ...], *, branches: int, batched: bool, text_tokens: int = _TEXT_TOKENS
    ) -> int:
        """Bytes of all tensors that two blocks have at a time in a step; no allocator's rounding, no workspaces."""
        batch, channels, *cells = latents_BCTHW
        samples, prompts = (branches * batch, 1) if batched else (batch, branches)

        def run(twin: WanDiT) -> None:
            x = torch.empty(batch, channels, *cells, device="meta")
            text = torch.empty(samples, text_tokens, self.spec.text_dim, device="meta", dtype=self.dtype)
            read = [under_empty_control(twin.read_prompt(text), twin, x) for _ in range(prompts)]
            read = [prompt._replace(control=read[0].control) for prompt in read]  # they have it in common
            twin.velocities(x, torch.empty(batch, device="meta"), read)

        most = 0
        for sets in {expert.adapters for expert in self.experts} or {()}:
            twin = self._twin()  # made here: its weights do not count
            attach(twin, [_in_few_blocks(adapters, twin) for adapters in sets])
            with torch.inference_mode():
                most = max(most, peak_bytes(functools.partial(run, twin)))
        return most

    def prompt_bytes(self, batch: int, *, branches: int, text_tokens: int = _TEXT_TOKENS) -> int:
        """Of the keys and values that all blocks but two, which `counted` sees, have of the prompts."""
        blocks = max(0, self.spec.num_blocks - 2)
        return 2 * blocks * batch * branches * text_tokens * self.spec.dim * self.dtype.itemsize

    def _twin(self) -> WanDiT:
        """Two blocks without weights: the others use the same memory again."""
        spec = replace(self.spec.first_layers(2), image_dim=None, added_kv_proj_dim=None)
        twin = without_weights(spec, self.dtype, replace(self.choices, collapses_padding=False))
        if self.by_block:
            twin.run_blocks = block_by_block
        return twin


def _in_few_blocks(adapters: Adapters, twin: WanDiT) -> Adapters:
    """For every block of a network with fewer, what any block has: all there is to compute beside one."""
    modules = {path for path, _ in twin.named_modules()}
    changes: dict[str, Adapter] = {}
    for name, adapter in adapters.changes.items():
        block = _BLOCK.fullmatch(name)
        for index in range(twin.spec.num_blocks) if block else (0,):
            own = name if block is None else f"{block[1]}{index}{block[3]}"
            if own.rpartition(".")[0] in modules:
                changes.setdefault(own, adapter)
    return replace(adapters, changes=changes)
