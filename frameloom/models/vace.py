"""VACE (arXiv:2503.07598): a WanDiT with blocks beside its own, which see a control and give hints after some layers.

Parameter names are those of Diffusers checkpoints (WanVACETransformer3DModel): a state dict loads strictly. The control
is a latent beside that of the video (pipeline/vace.py makes it); it comes with the prompt, as `Prompt.control`.
"""

# Shape suffixes: those of models/wan_dit.py.

import functools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from frameloom.errors import CheckpointError, InternalError, RequestError
from frameloom.models.dit_block import Block, KeysValues, Looked
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.wan_dit import Control, FrameTimes, Prompt, Step, WanDiT
from frameloom.ops.quantized import Linear

Hints = Iterator[tuple[int, Tensor]]


def make_dit(spec: TransformerSpec) -> WanDiT:
    """The network of a spec. Raises CheckpointError on an impossible one."""
    return VaceDiT(spec) if isinstance(spec, VaceSpec) else WanDiT(spec)


def strengths_for(spec: VaceSpec, given: float | Sequence[float]) -> tuple[float, ...]:
    """How much the hint after each VACE layer counts: one number for all, or one for each.

    Raises RequestError for another count, or for what is no finite number.
    """
    count = len(spec.vace_layers)
    strengths = (float(given),) * count if isinstance(given, int | float) else tuple(map(float, given))
    if len(strengths) != count:
        raise RequestError(f"{len(strengths)} control strengths do not fit {count} VACE layers; give 1 or {count}")
    if not all(map(math.isfinite, strengths)):
        raise RequestError(f"control strength {given} is no finite number; give numbers such as 1.0")
    return strengths


def under_empty_control(prompt: Prompt, dit: WanDiT, x_BCTHW: Tensor) -> Prompt:
    """The prompt with a control of the size of the latents where `dit` needs one; for computing shapes."""
    if not isinstance(dit, VaceDiT):
        return prompt
    empty = x_BCTHW.new_empty(1, dit.spec.vace_in_channels, *x_BCTHW.shape[2:])
    return prompt._replace(control=Control(empty, strengths_for(dit.spec, 1.0)))


class VaceDiT(WanDiT):
    """The whole network. `block_list`: its own blocks, then those beside; the first are handed to `run_blocks`.

    The tokens of the control travel in the other half of the video's, so that both are divided alike.
    """

    spec: VaceSpec

    def __init__(self, spec: VaceSpec) -> None:
        """Random weights (none under torch.device("meta")). Raises CheckpointError on an impossible spec."""
        _check_layers(spec)
        super().__init__(spec)
        self.vace_patch_embedding = nn.Conv3d(spec.vace_in_channels, spec.dim, spec.patch_size, stride=spec.patch_size)
        self.vace_blocks = nn.ModuleList(VaceBlock(spec, is_first=layer == 0) for layer in spec.vace_layers)
        for layer in spec.vace_layers:
            self.blocks[layer] = HintedBlock(spec)

    def forward(
        self,
        x_BCTHW: Tensor,
        timestep: Tensor | FrameTimes,
        text_BSE: Tensor,
        image_BNE: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """As `WanDiT.forward`, under a control. Raises RequestError on a misfit."""
        self._check_latents(x_BCTHW, timestep)
        prompt = self.read_prompt(text_BSE, image_BNE)._replace(control=control)
        (velocity_BCTHW,) = self.velocities(x_BCTHW, timestep, [prompt])
        return velocity_BCTHW

    @property
    def block_list(self) -> list[Block]:
        """Its own blocks, first to last, then those beside."""
        return [*super().block_list, *self.blocks_beside]

    @property
    def blocks_beside(self) -> list["VaceBlock"]:
        """The VACE blocks, first to last."""
        return cast("list[VaceBlock]", list(self.vace_blocks))

    def _embed(self, x_BCTHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The tokens of the latents and, beside each, that of the control: (B, L, 2 D)."""
        x_BLD = self._patches(x_BCTHW, self.patch_embedding)
        control_BLD = self._patches(self._control_of(prompts, x_BCTHW), self.vace_patch_embedding)
        return torch.cat((x_BLD, control_BLD.expand_as(x_BLD)), dim=-1)

    def _pass_blocks(self, x_BLD: Tensor, step: Step, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Until the first block beside reads the prompt, all prompts share one computation."""
        x_BLD, control_BLD = (half_BLD.contiguous() for half_BLD in x_BLD.chunk(2, dim=-1))
        own, first = super().block_list, self.blocks_beside[0]
        looked = first.look(first.join(control_BLD, x_BLD), step.modulation(len(own)), step.rope)
        hinted = []
        for prompt in prompts:
            repeats = prompt.batch_size // x_BLD.shape[0]
            hints = self._hints(looked.repeated(repeats), step.repeated(repeats), prompt)
            hinted.append(self._with_hints(prompt, hints))
        return self.run_blocks(own, x_BLD, step, hinted)

    def _hints(self, looked: Looked, step: Step, prompt: Prompt) -> Hints:
        """The layers after which there is a hint, and the hints, each made when it is asked for: one lies in memory."""
        first, *others = self.blocks_beside
        strengths = _control(prompt).strengths
        index = self.spec.num_layers
        control_BLD = first.read(looked, step.modulation(index), prompt.of_blocks[index])
        yield 0, first.hint(control_BLD, strengths[0])
        for layer, block, strength in zip(self.spec.vace_layers[1:], others, strengths[1:], strict=True):
            index += 1
            control_BLD = block(control_BLD, step.modulation(index), step.rope, prompt.of_blocks[index])
            yield layer, block.hint(control_BLD, strength)

    def _with_hints(self, prompt: Prompt, hints: Hints) -> Prompt:
        of_blocks = list(prompt.of_blocks)
        for layer in self.spec.vace_layers:
            of_blocks[layer] = of_blocks[layer]._replace(hint=functools.partial(_hint_after, layer, hints))
        return prompt._replace(of_blocks=tuple(of_blocks))

    def _control_of(self, prompts: Sequence[Prompt], x_BCTHW: Tensor) -> Tensor:
        """The control that all prompts came with. Raises RequestError where it does not fit the latents."""
        control = _control(prompts[0])
        if any(prompt.control is not control for prompt in prompts):
            raise InternalError("the prompts of one step came with different controls")
        batch, _, *size = x_BCTHW.shape
        samples, channels, *given = control.x_BCTHW.shape
        strengths_for(self.spec, control.strengths)
        if channels != self.spec.vace_in_channels:
            raise RequestError(
                f"the control has {channels} channels; this checkpoint takes {self.spec.vace_in_channels}"
            )
        if given != size or samples not in (1, batch):
            raise RequestError(
                f"the control has {samples} samples of {given} latent cells; prepare {batch}, or 1 for all, of {size}"
            )
        return control.x_BCTHW.to(x_BCTHW.device)


class VaceBlock(Block):
    """A block of the control's own stream; the first also sees the latents."""

    def __init__(self, spec: VaceSpec, *, is_first: bool) -> None:
        super().__init__(spec)
        self.proj_in = Linear(spec.dim, spec.dim) if is_first else None
        self.proj_out = Linear(spec.dim, spec.dim)

    def join(self, control_BLD: Tensor, x_BLD: Tensor) -> Tensor:
        """The beginning of the stream: the control, and the latents that are to be controlled."""
        if self.proj_in is None:
            raise InternalError("only the first VACE block joins the control and the latents")
        joined_BLD: Tensor = self.proj_in(control_BLD) + x_BLD
        return joined_BLD

    def hint(self, control_BLD: Tensor, strength: float) -> Tensor:
        """What the stream says after this block."""
        hint_BLD: Tensor = self.proj_out(control_BLD)
        return hint_BLD if strength == 1 else hint_BLD * strength


class HintedBlock(Block):
    """A block after which a hint is added."""

    def read(self, looked: Looked, modulation: Sequence[Tensor], prompt: KeysValues) -> Tensor:
        """As `Block.read`, and the hint."""
        if prompt.hint is None:
            raise InternalError("a block waited for a hint, and the network gave none")
        x_BLD = super().read(looked, modulation, prompt)
        return x_BLD + prompt.hint()


def _control(prompt: Prompt) -> Control:
    if prompt.control is None:
        raise RequestError("this is a VACE checkpoint, which computes under a control; prepare one (pipeline/vace.py)")
    return prompt.control


def _hint_after(layer: int, hints: Hints) -> Tensor:
    """The hint after a layer; those of layers that were left out are passed over."""
    for found, hint_BLD in hints:
        if found == layer:
            return hint_BLD
    raise InternalError(f"the hint after layer {layer} was asked for twice, or after a later one")


def _check_layers(spec: VaceSpec) -> None:
    layers = spec.vace_layers
    if not layers or layers[0] != 0 or layers[-1] >= spec.num_layers or list(layers) != sorted(set(layers)):
        raise CheckpointError(
            f"vace_layers is {list(layers[:20])}; it must begin with 0 and rise, below the {spec.num_layers} layers"
        )
