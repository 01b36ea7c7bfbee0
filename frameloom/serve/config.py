"""Everything `frameloom serve` was told, checked once at the door."""

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from frameloom.config import MAX_LORA_STRENGTH
from frameloom.config import lora as parsed_lora
from frameloom.errors import RequestError
from frameloom.types import EngineConfig, Lora

LOCAL: Final = "local"
"""Whose jobs they are where no keys are asked for."""
MAX_ATTEMPTS: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the server takes. Times in seconds, sizes in bytes.

    `queued` jobs in all and `queued_by_key`, `queued_s` of work foreseen, `body_bytes` of a request, `image_pixels` and
    `video_frames` of what is given, `prompt_chars`; `pixels_frames`: width x height x frames of a video. `steps`.
    """

    queued: int = 100
    queued_by_key: int = 50
    queued_s: float = 4 * 3600.0
    body_bytes: int = 64 * 2**20
    image_pixels: int = 40_000_000
    video_frames: int = 1_000
    prompt_chars: int = 8_000
    pixels_frames: int = 1920 * 1088 * 481
    steps: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """How long and how much is kept: `ttl_s` after a job has ended, `quota_bytes` of all, `reserve_bytes` stay free."""

    ttl_s: float = 7 * 86_400.0
    quota_bytes: int | None = None
    reserve_bytes: int = 256 * 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """Who may ask: a name, its secret, and what it may have. `priority`: of its jobs at most, higher goes first.

    `secret_sha256`: in its place, the digest of the secret in hexadecimal digits.
    """

    name: str
    secret: str = field(default="", repr=False)
    secret_sha256: str = field(default="", repr=False)
    queued: int | None = None
    priority: int = 0

    @property
    def digest(self) -> bytes:
        """SHA-256 of the secret: what is compared, in constant time."""
        return (
            bytes.fromhex(self.secret_sha256) if self.secret_sha256 else hashlib.sha256(self.secret.encode()).digest()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long the server waits, in seconds: for a worker's engine, for a sign of life, for a sign of progress.

    `deadline_s`: of a job that names none, from its acceptance on; None: it may take as long as it takes. `grace_s`:
    what a running job is given when the server is asked to end.
    """

    start_s: float = 600.0
    beat_s: float = 15.0
    progress_s: float = 900.0
    deadline_s: float | None = None
    grace_s: float = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """`model` as `frameloom.load` takes it, None the built-in; `name`: what clients call it.

    `loras`: files by the name that they are registered under. `keys`: none, and everybody on this machine may ask, or
    with `is_public` everybody who reaches it. `keys_file`: where they come from, and are read again on SIGHUP.
    `batch`: small jobs at most that a worker makes together; 1: one at a time, whose bytes are those of a run alone.
    `url_hosts`: from where pictures may be fetched, none by default; ("*",) for all that are public.
    """

    data: Path
    model: str | None = None
    variant: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    name: str = "frameloom-shapes"
    engine: EngineConfig = field(default_factory=EngineConfig)
    loras: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    batch: int = 1
    gpus_per_worker: int = 1
    keys: tuple[Key, ...] = ()
    keys_file: Path | None = None
    is_public: bool = False
    url_hosts: tuple[str, ...] = ()
    limits: Limits = Limits()
    keeping: Keeping = Keeping()
    patience: Patience = Patience()

    def lora(self, name: str, scale: float) -> Lora:
        """A registered LoRA as a request asks for it: `scale` times as strong as it is registered.

        Raises RequestError, one sentence without a path, for one that is not registered or would be too strong.
        """
        if name not in self.loras:
            known = ", ".join(self.loras) or "none"
            raise RequestError(f"there is no LoRA {name[:60]!r} here; registered are: {known}")
        found = parsed_lora(self.loras[name])
        strength = found.strength * scale
        if abs(strength) > MAX_LORA_STRENGTH:
            raise RequestError(
                f"LoRA {name!r} is registered with a strength of {found.strength:g}, of which {scale:g} times are more "
                f"than {MAX_LORA_STRENGTH}; give a scale of up to {MAX_LORA_STRENGTH / abs(found.strength):.3g}"
            )
        return replace(found, strength=strength)
