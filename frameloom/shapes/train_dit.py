"""Trains the DiT of the built-in model together with its text encoder, on cached latents of the finished VAE.

Run it through `python -m frameloom.shapes.train`. Flow matching: x_t = (1 - sigma) x + sigma noise, and the network
predicts the velocity noise - x at timestep 1000 sigma (arXiv:2209.03003, arXiv:2403.03206).
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameloom.models.dit_block import Attention, CrossAttention
from frameloom.models.encoders import TEXT_LENGTH, build_text_encoder
from frameloom.models.spec import TransformerSpec
from frameloom.models.tokenizer import Tokenizer, build_tokenizer
from frameloom.models.vae_state import CausalState
from frameloom.models.wan_dit import WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.shapes.tokens import pieces
from frameloom.shapes.train_vae import Z_DIM
from frameloom.shapes.training import Trainer, mixed_precision, rng_for, to_video
from frameloom.shapes.world import MOTIONS, Scene, describe, random_scene, render

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "umt5",
    "vocab_size": 256,  # the tokenizer's pieces, and a few to spare
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
SPEC = TransformerSpec(
    patch_size=(1, 4, 4),
    num_attention_heads=8,
    attention_head_dim=32,
    in_channels=Z_DIM,
    out_channels=Z_DIM,
    text_dim=128,
    freq_dim=128,
    ffn_dim=1024,
    num_layers=8,
    cross_attn_norm=True,
)
BATCH = 32
LEARNING_RATE = 2e-3
PROMPT_DROP = 0.1  # how often the prompt is empty, so that guidance has an unconditional prediction
ATTRIBUTE_DROP = 0.1  # how often a caption names only part of the scene
NOISE_SHIFT = 3.0  # of the noise levels trained on and sampled at
CLIPS = 6144
TEXT_TOKENS = 32  # positions computed one by one in training; the rest of the 512 are one key (see `SmallAttention`)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentClips:
    """Encoded training clips: float16 (N, Z, T', H', W') as the VAE gives them, their scenes and statistics."""

    latents: Tensor
    scenes: list[Scene]
    mean: Tensor  # (Z,)
    std: Tensor  # (Z,)

    def batch(self, indices: list[int]) -> Tensor:
        """Normalised latents, float32."""
        shape = (1, -1, 1, 1, 1)
        return (self.latents[indices].float() - self.mean.view(shape)) / self.std.view(shape)


@torch.no_grad()
def encode_clips(vae: WanVAE, count: int, folder: Path) -> LatentClips:
    """Render and encode `count` training clips, or read what this VAE has encoded before; clip i depends on i alone."""
    scenes = [random_scene(rng_for(i, salt=2)) for i in range(count)]
    cache = folder / f"latents-{_fingerprint(vae)}-{count}.pt"
    if cache.exists():
        z = torch.load(cache, weights_only=True)
    else:
        begun = time.monotonic()
        z = torch.cat([_encode(vae, range(start, min(start + 32, count))) for start in range(0, count, 32)])
        torch.save(z, cache)
        print(f"encoded {count} clips in {time.monotonic() - begun:.0f} s", flush=True)
    channels = z.float().transpose(0, 1).flatten(1)
    return LatentClips(latents=z, scenes=scenes, mean=channels.mean(1), std=channels.std(1))


def _fingerprint(vae: WanVAE) -> str:
    digest = hashlib.sha256()
    for parameter in vae.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _encode(vae: WanVAE, numbers: range) -> Tensor:
    rngs = [rng_for(i, salt=2) for i in numbers]
    device = next(vae.parameters()).device
    frames = to_video(render(random_scene(rng), rng) for rng in rngs).to(device)
    with mixed_precision(device):
        moments = vae.encode_chunk(frames, CausalState())
    return moments[:, :Z_DIM].half().cpu()


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A training caption: sometimes empty, sometimes of one attribute or two, sometimes capitalised."""
    if rng.random() < PROMPT_DROP:
        return ""
    text = describe(scene, rng)
    if rng.random() < ATTRIBUTE_DROP:
        doing = MOTIONS[scene.motion][0][0]
        partial = (
            f"a {scene.colour} {scene.shape}",
            f"a {scene.shape}",
            f"a {scene.shape} {doing}",
            scene.colour,
            doing,
        )
        text = partial[rng.integers(len(partial))]
    return text.capitalize() if rng.random() < 0.3 else text


class TextAndVideo(nn.Module):
    """The text encoder and the DiT as one trainable module."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(TEXT_CONFIG).to_empty(device="cpu")
        self.text_encoder.tie_weights()
        self.transformer = WanDiT(SPEC)
        _initialise_text(self.text_encoder)
        _initialise_dit(self.transformer)
        bias = torch.zeros(TEXT_TOKENS + 1)
        bias[-1] = math.log(TEXT_LENGTH - TEXT_TOKENS)
        for module in self.transformer.modules():
            if isinstance(module, Attention):
                module.attend = SmallAttention(bias if isinstance(module, CrossAttention) else None)

    def forward(self, x_BCTHW: Tensor, timestep_B: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Velocity, float32, for prompts of TEXT_TOKENS token ids."""
        embedded = self.text_encoder(ids_BS, mask_BS) * mask_BS[..., None]
        text_BSE = F.pad(embedded, (0, 0, 0, 1))
        velocity: Tensor = self.transformer(x_BCTHW, timestep_B, text_BSE)
        return velocity.float()


class SmallAttention:
    """softmax(QK)V written out: at these lengths its gradient costs a third of the flash kernel's on a CPU.

    The bias makes one key stand for a prompt's padding: n equal keys weigh as much as one with log(n) added.
    """

    def __init__(self, bias_S: Tensor | None = None) -> None:
        self.bias_S = bias_S

    def __call__(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
        """As `attention.core.sdpa`, with its own bias on the keys beside the one of the call."""
        q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSHK, v_BSHK))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        if self.bias_S is not None:
            scores = scores + self.bias_S.to(scores.device)
        if bias_BS is not None:
            scores = scores + bias_BS[:, None, None]
        out: Tensor = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
        return out


def train_dit(
    folder: Path,
    vae: WanVAE,
    device: torch.device,
    *,
    total_steps: int,
    start: Mapping[str, Tensor] | None = None,
    compile_model: bool = True,
) -> tuple[TextAndVideo, LatentClips, float]:
    """Train or go on; returns the averaged networks, the clips and the seconds spent (in `folder`/dit.pt).

    `start` gives weights of TextAndVideo to begin from.
    """
    torch.manual_seed(1)
    torch.set_flush_denormal(True)
    clips = encode_clips(vae, CLIPS, folder)
    model = TextAndVideo()
    if start is not None:
        model.load_state_dict(start)
    model.to(device)
    trainer = Trainer(
        model,
        path=folder / "dit.pt",
        total_steps=total_steps,
        learning_rate=LEARNING_RATE,
        plain=("scale_shift_table", "shared", "relative", "patch_embedding", "proj_out"),
    )
    run = torch.compile(model, dynamic=False) if compile_model else model
    tokenizer = build_tokenizer(pieces())
    saved = shown = time.monotonic()
    losses: list[float] = []
    while trainer.step < total_steps:
        loss = _loss(run, clips, tokenizer, rng_for(trainer.step, salt=3), device)
        trainer.update(loss)
        losses.append(float(loss.detach()))
        now = time.monotonic()
        if now - shown > 30:
            print(
                f"dit {trainer.step}/{total_steps} loss {np.mean(losses):.4f} {trainer.elapsed_s / 60:.1f} min",
                flush=True,
            )
            shown, losses = now, []
        if now - saved > 180:
            trainer.save()
            saved = now
    trainer.save()
    trainer.use_average()
    return model, clips, trainer.elapsed_s


def _loss(run: Any, clips: LatentClips, tokenizer: Tokenizer, rng: np.random.Generator, device: torch.device) -> Tensor:
    indices = rng.integers(len(clips.scenes), size=BATCH).tolist()
    x = clips.batch(indices).to(device)
    prompts = [caption(clips.scenes[i], rng) for i in indices]
    ids, mask = (tokens.to(device) for tokens in tokenizer.encode(prompts, length=TEXT_TOKENS))
    sigma = _noise_levels(rng).to(device)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(device)
    mix = sigma.view(-1, 1, 1, 1, 1)
    with mixed_precision(device):
        velocity = run((1 - mix) * x + mix * noise, sigma * 1000, ids, mask)
    return F.mse_loss(velocity, noise - x)


def _noise_levels(rng: np.random.Generator) -> Tensor:
    """Logit-normal noise levels (B,), shifted like the sampler's schedule.

    Smooth pictures outlive a lot of noise: where the shape is and goes is decided above 0.95, and there must be enough
    training there. Unshifted levels left colour right and motion to chance.
    """
    sigma = 1 / (1 + np.exp(-rng.normal(0.0, 1.2, BATCH)))
    return torch.from_numpy((NOISE_SHIFT * sigma / (1 + (NOISE_SHIFT - 1) * sigma)).astype(np.float32))


def _initialise_text(model: nn.Module) -> None:
    """T5's initialisation: its attention has no 1/sqrt(d), the queries start small instead."""
    width, head = TEXT_CONFIG["d_model"], TEXT_CONFIG["d_kv"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "shared" in name or "relative" in name:
                parameter.normal_(0, 1.0 if "shared" in name else width**-0.5)
            else:
                fan_in = parameter.shape[1] * (head if name.endswith(".q.weight") else 1)
                parameter.normal_(0, fan_in**-0.5)


def _initialise_dit(model: WanDiT) -> None:
    """Blocks start as near-identities and the output at zero, as the original's init_weights does.

    The prompt's padding starts with little weight. It is 480 keys of value zero: at a score of zero it would take nine
    tenths of the attention, and the words would hardly be learnt. A small bias on the keys is all that a padding key
    has, so RMSNorm makes it a constant vector of length one, and the bias on the queries points away from it.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "scale_shift_table" not in name:
                nn.init.xavier_uniform_(parameter.flatten(1))
            elif name.endswith("bias"):
                parameter.zero_()
        model.proj_out.weight.zero_()
        for module in model.modules():
            if isinstance(module, CrossAttention):
                module.to_k.bias.fill_(-0.05)
                module.to_q.bias.fill_(1.5)
