"""What a random pipeline is: how its parts are made, and what it is asked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import diffusers
import torch

from frameloom.errors import RequestError

Parts = Callable[["Scale"], dict[str, Any]]
Ask = Callable[["Scale"], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How large a picture, in pixels, how many frames (4k+1) and steps; `full` widths are those of Wan's own VAEs.

    The other networks stay small: what is taken over of them does not depend on the width.
    """

    height: int = 32
    width: int = 64
    frames: int = 9
    steps: int = 2
    full: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A pipeline of a class of Diffusers, of random parts from a seed or from a folder, and a request to it.

    `pipeline` is the class's name, `kind` which of its models where there are several; `needs` a library that Diffusers
    wants for it.
    """

    pipeline: str
    parts: Parts
    ask: Ask
    kind: str = ""
    needs: str = ""
    folder: str | None = None

    @property
    def name(self) -> str:
        """As tests and the table call it."""
        return f"{self.pipeline} ({self.kind})" if self.kind else self.pipeline

    @property
    def missing(self) -> str | None:
        """Why it cannot be built here; None where it can."""
        if not hasattr(diffusers, self.pipeline):
            return f"Diffusers {diffusers.__version__} has no {self.pipeline}"
        if self.needs and find_spec(self.needs) is None:
            return f"Diffusers' {self.pipeline} needs {self.needs}, which is not here"
        return None

    def build(self, scale: Scale, *, seed: int = 0) -> Any:
        """The pipeline, on the CPU in float32, its networks in evaluation mode. Raises RequestError."""
        if self.missing:
            raise RequestError(self.missing)
        torch.manual_seed(seed)
        pipe: Any
        if self.folder:
            pipe = getattr(diffusers, self.pipeline).from_pretrained(self.folder, local_files_only=True)
        else:
            pipe = of_diffusers(self.pipeline, **self.parts(scale))
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipe

    def run(self, pipe: Any, scale: Scale) -> torch.Tensor:
        """All frames of the outcome as (N, H, W, channels), float32 in [0, 1] on the CPU; the same noise each time."""
        torch.manual_seed(1)  # some draw what no generator of the request is asked for
        return frames_of(pipe(**self.ask(scale) | {"generator": torch.Generator().manual_seed(1)}))


def frames_of(output: Any) -> torch.Tensor:
    """What a pipeline returned, of whatever kind its pictures are, as (N, H, W, channels)."""
    found = next(getattr(output, name) for name in ("frames", "images", "video") if hasattr(output, name))
    return torch.cat(list(_pictures(found)))


def _pictures(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, list | tuple):
        for one in found:
            yield from _pictures(one)
        return
    pictures = torch.as_tensor(found).detach().float().cpu()
    if pictures.shape[-1] not in (3, 4):
        pictures = pictures.movedim(-3, -1)
    yield pictures.reshape(-1, *pictures.shape[-3:])


def of_diffusers(name: str, **config: Any) -> Any:
    """An object of a class of Diffusers, which not every release has."""
    return attrgetter(name)(diffusers)(**config)
