"""Features of prompts, kept in the cache folder under the hash of all that they depend on: a prompt that was read once
needs no text encoder again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.engine.journal import Journal
from frameloom.models.encoders import TEXT_LENGTH, TextEncoder, clean_prompt
from frameloom.models.umt5 import Umt5Encoder
from frameloom.platform.device import device_name
from frameloom.settings import LOGGER_NAME, cache_folder
from frameloom.weights.checkpoint import Component
from frameloom.weights.fingerprint import fingerprint_of_parts

log = logging.getLogger(LOGGER_NAME)

_MOST_BYTES: Final = 256 * 10**6  # of the folder: some thousand prompts of the large text encoder
_FEATURES: Final = "features"
_LENGTH: Final = "length"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CachedPrompts:
    """A text encoder that looks first whether the same tokens were read before, with the same outcome.

    `facts`: what the features depend on besides the tokens. The entries are those of a journal: whole and checked.
    """

    encoder: TextEncoder
    folder: Path
    facts: str
    most_bytes: int = _MOST_BYTES

    @property
    def model(self) -> Umt5Encoder:
        """The network."""
        return self.encoder.model

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts as features (B, S, E), the same bits from the cache as from the encoder."""
        ids_BL, _ = self.encoder.tokenizer.encode([clean_prompt(text) for text in prompts], length=TEXT_LENGTH)
        name = hashlib.sha256(json.dumps([self.facts, ids_BL.tolist()]).encode()).hexdigest()
        entries = Journal(self.folder, self.facts)
        found = entries.read(name)
        if found is not None:
            features, facts = found
            log.info("the prompt's features are in the cache: the text encoder is not needed")
            self._touch(name)
            kept_BSE = features[_FEATURES]
            return F.pad(kept_BSE, (0, 0, 0, int(facts[_LENGTH]) - kept_BSE.shape[1])).to(self.encoder.model.device)
        features_BSE = self.encoder.encode_prompts(prompts)
        self._keep(entries, name, features_BSE)
        return features_BSE

    def _keep(self, entries: Journal, name: str, features_BSE: Tensor) -> None:
        """Without the zeros at the end, which are most of it."""
        used = (features_BSE != 0).any(-1).any(0).nonzero()
        length = int(used.max()) + 1 if len(used) else 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            facts = {_LENGTH: str(features_BSE.shape[1])}
            entries.put(name, {_FEATURES: features_BSE[:, :length]}, facts, waits=False)
            self._sweep()
        except OSError as error:
            log.info("the prompt's features are not kept in %s: %s", self.folder, error.strerror)

    def _touch(self, name: str) -> None:
        try:
            os.utime(self.folder / f"{name}.safetensors")
        except OSError as error:
            log.debug("%s: %s", self.folder, error.strerror)

    def _sweep(self) -> None:
        """Let go of what was not used for the longest time, until the folder is small enough."""
        files = [(path, path.stat()) for path in self.folder.glob("*.safetensors")]
        total = sum(stat.st_size for _, stat in files)
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size


def cached_prompts(encoder: TextEncoder, component: Component, device: torch.device) -> CachedPrompts:
    """`encoder` with the cache folder's features: of the same weights, dtype, device and versions."""
    weights, dtype = fingerprint_of_parts({"text_encoder": component}), str(encoder.model.dtype)
    told = [weights, dtype, device_name(device), torch.__version__, version("frameloom")]
    return CachedPrompts(encoder=encoder, folder=cache_folder() / "prompts", facts=json.dumps(told))
