"""What a transformer is tried on: random input of its kind, and everything that may be asked of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frameloom.models.dit_fast import LoopChoices
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.wan_dit import Control, FrameTimes, WanDiT
from frameloom.pipeline.stages import PLAINLY, MakePredictor, Predictor
from frameloom.pipeline.vace import VaceConditions

_PATCHES = (3, 5, 4)  # frames, rows and columns of tokens that a transformer is tried on
_TEXT_TOKENS, _WORDS, _IMAGE_TOKENS = 512, (20, 5), 257
_TIMESTEP = 500.0
_STRENGTHS = (1.0, 0.75)  # of the hints, in turns: one that is left out, or in another's place, is seen
Compute = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """Random input of a transformer: latents, their timestep, two prompts that zeros fill up, an image and a control.

    `frame_times`: the first frame is given, as an image would be. `image_BNE` and `control` are there if it asks.
    """

    x_BCTHW: Tensor
    timestep_B: Tensor
    frame_times: FrameTimes
    texts: tuple[Tensor, Tensor]
    image_BNE: Tensor | None
    control: Control | None

    @classmethod
    def of(cls, spec: TransformerSpec, device: torch.device) -> "Trial":
        """The same numbers on every machine."""
        generator = torch.Generator().manual_seed(0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        grid = [cells * patch for cells, patch in zip(_PATCHES, spec.patch_size, strict=True)]
        texts = [noise(1, _TEXT_TOKENS, spec.text_dim) for _ in range(2)]
        for text, words in zip(texts, _WORDS, strict=True):
            text[:, words:] = 0
        x_BCTHW = noise(1, spec.in_channels, *grid)
        image_BNE = control = None
        if spec.image_dim is not None:
            image_BNE = noise(1, spec.pos_embed_seq_len or _IMAGE_TOKENS, spec.image_dim)
        if isinstance(spec, VaceSpec):
            strengths = tuple(_STRENGTHS[index % 2] for index in range(len(spec.vace_layers)))
            control = Control(noise(1, spec.vace_in_channels, *grid), strengths)
        return cls(
            x_BCTHW=x_BCTHW,
            timestep_B=torch.tensor([_TIMESTEP], device=device),
            frame_times=FrameTimes(
                torch.tensor([[0.0, _TIMESTEP]], device=device), (torch.arange(_PATCHES[0], device=device) > 0).long()
            ),
            texts=(texts[0], texts[1]),
            image_BNE=image_BNE,
            control=control,
        )

    def plain(self, dit: WanDiT) -> dict[str, Compute]:
        """What may be asked of the network, each in the reference's way."""
        values_M, index_F = self.frame_times.values_BM[0], self.frame_times.index_F
        times_BL = values_M[index_F].repeat_interleave(_PATCHES[1] * _PATCHES[2])[None]
        return {
            "one prompt": self._one_prompt(dit, self.timestep_B),
            "guidance": self._guidance(dit, PLAINLY, Predictor),
            "a given frame": self._one_prompt(dit, times_BL),
        }

    def fast(
        self, dit: WanDiT, loop: LoopChoices, make_predictor: MakePredictor = Predictor
    ) -> Iterator[tuple[str, str, Compute]]:
        """The same by the ways of `loop`: what is asked, in which way, and how it is computed."""
        yield "one prompt", "as chosen here", self._one_prompt(dit, self.timestep_B)
        in_turn = replace(loop, guidance_batched=False)
        yield "guidance", "one branch after the other", self._guidance(dit, in_turn, make_predictor)
        if loop.guidance_batched:
            yield "guidance", "both branches in one batch", self._guidance(dit, loop, make_predictor)
        if loop.distinct_timesteps:
            yield "a given frame", "two timesteps embedded", self._one_prompt(dit, self.frame_times)

    def everything(self, dit: WanDiT, loop: LoopChoices, make_predictor: MakePredictor = Predictor) -> Compute:
        """All that `fast` asks, in one row of numbers."""
        computations = [compute for _, _, compute in self.fast(dit, loop, make_predictor)]
        return lambda: torch.cat([compute().flatten() for compute in computations])

    def _one_prompt(self, dit: WanDiT, timestep: Tensor | FrameTimes) -> Compute:
        make = VaceConditions(control=self.control).predictor(Predictor)
        predict = make(self.texts[:1], PLAINLY, self.image_BNE)
        return lambda: torch.cat(predict(dit, self.x_BCTHW, timestep))

    def _guidance(self, dit: WanDiT, loop: LoopChoices, make_predictor: MakePredictor) -> Compute:
        make = VaceConditions(control=self.control).predictor(make_predictor)
        predict = make(self.texts, loop, self.image_BNE)
        return lambda: torch.cat(predict(dit, self.x_BCTHW, self.timestep_B))
