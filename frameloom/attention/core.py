"""The attention that runs everywhere, and the choice among all there is.

One choice holds for a whole network. An explicit name means that backend or an error; "auto" takes another one than
torch's own only where it computes the same function and is known to be faster, and goes back when its kernel fails.
"""

import difflib
import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.attention.backend import Attend, Backend, Kernel, Place
from frameloom.attention.flash import FLASH2, FLASH3
from frameloom.attention.native import NATIVE
from frameloom.attention.sage import SAGE
from frameloom.attention.vendor import AITER, NPU_FUSION
from frameloom.errors import FrameloomError, InternalError, RequestError
from frameloom.ops.registry import Exactness
from frameloom.platform.base import first_line
from frameloom.platform.device import is_memory_error
from frameloom.settings import LOGGER_NAME

__all__ = ["BACKENDS", "NAMES", "Attend", "Availability", "Guarded", "backends", "choose", "cuda_capability", "sdpa"]

BACKENDS: tuple[Backend, ...] = (
    FLASH3,
    FLASH2,
    AITER,
    NPU_FUSION,
    NATIVE,
    SAGE,
)  # beside sdpa; auto tries them in this order
NAMES = ("auto", "sdpa", *(backend.name for backend in BACKENDS))
_WIDE_BLOCK = 1 << 21  # numbers of q that are held in float32 at a time: 8 MiB, near the caches of a CPU

log = logging.getLogger(LOGGER_NAME)


def sdpa(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
    """Attention by torch's own scaled_dot_product_attention: every device, every float dtype.

    With a bias, half precisions are computed in float32 and rounded once. Torch documents its mask to be of
    their dtype: log(490), rounded to bfloat16, changes the weight of its key by 0.7 %, where bfloat16 attention loses
    0.2 % altogether. Such calls have few keys and cost little; q goes through in blocks, to bound the memory.
    """
    if bias_BS is None:
        return _transposed(q_BLHK, k_BSHK, v_BSHK)
    wide = torch.promote_types(q_BLHK.dtype, torch.float32)
    k_BSHK, v_BSHK, mask_B11S = k_BSHK.to(wide), v_BSHK.to(wide), bias_BS.to(wide)[:, None, None]
    if wide == q_BLHK.dtype:
        return _transposed(q_BLHK, k_BSHK, v_BSHK, mask_B11S)
    rows = max(1, _WIDE_BLOCK * q_BLHK.shape[1] // max(1, q_BLHK.numel()))
    out_BLHK = q_BLHK.new_empty(q_BLHK.shape)
    for start in range(0, q_BLHK.shape[1], rows):
        block = slice(start, start + rows)
        out_BLHK[:, block] = _transposed(q_BLHK[:, block].to(wide), k_BSHK, v_BSHK, mask_B11S)
    return out_BLHK


def _transposed(q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask: Tensor | None = None) -> Tensor:
    q_BHLK, k_BHSK, v_BHSK = q_BLHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2)
    return F.scaled_dot_product_attention(q_BHLK, k_BHSK, v_BHSK, attn_mask=mask).transpose(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """Whether a backend can be used on a platform: `reason_missing` is None where it can.

    `hint` is the way to get its package; empty where that would not help, or is not needed.
    """

    name: str
    exactness: Exactness
    reason_missing: str | None
    hint: str


class Guarded:
    """A kernel of another package. What it does when it fails depends on who chose it.

    Chosen automatically: one warning, and `sdpa` takes over from then on. Asked for by name: RequestError. Memory that
    runs out is nobody's fault and passes through. Calls with a bias go to `sdpa`, if it was chosen for such calls.
    """

    def __init__(self, name: str, kernel: Kernel, *, automatic: bool, biased: bool) -> None:
        self.name = name
        self.kernel = kernel
        self.automatic = automatic
        self.biased = biased
        self.failed = False

    def __call__(self, q_BLHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, bias_BS: Tensor | None = None, /) -> Tensor:
        """Return out_BLHK; see `Attend`."""
        if bias_BS is not None and not self.biased:
            raise InternalError(f"attention backend {self.name!r} takes no bias; choose it with biased=True")
        if self.failed or bias_BS is not None:
            return sdpa(q_BLHK, k_BSHK, v_BSHK, bias_BS)
        try:
            return self.kernel(q_BLHK, k_BSHK, v_BSHK)
        except Exception as error:
            self._answer(error)
        return sdpa(q_BLHK, k_BSHK, v_BSHK)

    def _answer(self, error: Exception) -> None:
        if isinstance(error, FrameloomError) or is_memory_error(error):
            raise error
        if not self.automatic:
            raise RequestError(
                f"attention backend {self.name!r} failed ({first_line(error)}); use --attention auto or sdpa"
            ) from error
        self.failed = True
        log.warning("attention: %s failed (%s); sdpa takes over", self.name, first_line(error))


def choose(
    name: str = "auto",
    *,
    platform: str = "cpu",
    head_dim: int | None = None,
    dtype: torch.dtype | None = None,
    biased: bool = False,
    capability: tuple[int, int] | None = None,
    because: str | None = None,
) -> tuple[Attend, str]:
    """The backend called `name`, or the best one for "auto", and why in a few words.

    `platform` as frameloom.platform names it. `biased`: some calls will bring a bias on the keys; a backend that takes
    none then leaves those to sdpa, which the log says once. `capability` None: that of the current CUDA device.
    Without head_dim and dtype, auto stays with sdpa. `because`: why this name, if it was not the user's; if its kernel
    fails, sdpa then takes over. Raises RequestError for a name that is unknown or cannot be used.
    """
    place = Place(
        platform=platform, head_dim=head_dim, dtype=dtype, capability=capability or cuda_capability(None, platform)
    )
    if name == "auto":
        return _automatic(place, biased)
    if name == "sdpa":
        return sdpa, f"sdpa: {because or 'asked for by name'}"
    backend = _named(name)
    if reason := backend.out_of_place(place):
        raise RequestError(f"attention backend {name!r} cannot be used: {reason}; use --attention auto or sdpa")
    if reason := backend.lacks():
        raise RequestError(
            f"attention backend {name!r} cannot be used: {reason}; {backend.hint}, or use --attention auto"
        )
    lossy = " (lossy)" if backend.exactness == "lossy" else ""
    return _guarded(backend, biased, automatic=because is not None), f"{name}{lossy}: {because or 'asked for by name'}"


def backends(platform: str) -> tuple[Availability, ...]:
    """Every backend, and whether it can be used on a platform (and the current device, if that is CUDA)."""
    place = Place(platform=platform, capability=cuda_capability(None, platform))
    own = Availability(name="sdpa", exactness="bitwise", reason_missing=None, hint="")
    return (own, *(_availability(backend, place) for backend in BACKENDS))


def cuda_capability(device: torch.device | None, platform: str = "cuda") -> tuple[int, int] | None:
    """Compute capability of a CUDA device, or of the current one; None on other platforms and where there is none.

    A device of another kind (weights that wait in main memory) counts as the current one.
    """
    if platform != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device if device is not None and device.type == "cuda" else None)


def _availability(backend: Backend, place: Place) -> Availability:
    here = backend.out_of_place(place)
    reason = here or backend.lacks()
    hint = backend.hint if reason and not here else ""
    return Availability(name=backend.name, exactness=backend.exactness, reason_missing=reason, hint=hint)


def _automatic(place: Place, biased: bool) -> tuple[Attend, str]:
    passed_over = []
    for backend in BACKENDS:
        if backend.faster is None or backend.exactness == "lossy" or place.platform not in backend.platforms:
            continue
        reason = backend.refuses(place) if place.known else "head dimension, dtype or device are not known"
        if reason is None:
            return _guarded(backend, biased, automatic=True), f"{backend.name}: {backend.faster}"
        passed_over.append(f"; not {backend.name}: {reason}")
    return sdpa, "sdpa: runs on every device" + "".join(passed_over)


def _named(name: str) -> Backend:
    found = next((backend for backend in BACKENDS if backend.name == name), None)
    if found is not None:
        return found
    near = difflib.get_close_matches(str(name), NAMES, n=1)
    hint = f"did you mean {near[0]!r}? Known are" if near else "known are"
    raise RequestError(f"attention backend {name!r} does not exist; {hint} {', '.join(NAMES)}")


def _guarded(backend: Backend, biased: bool, *, automatic: bool) -> Guarded:
    if biased:
        log.info("attention: %s takes no bias on the keys; calls that bring one go to sdpa", backend.name)
    return Guarded(backend.name, backend.kernel(), automatic=automatic, biased=biased)
