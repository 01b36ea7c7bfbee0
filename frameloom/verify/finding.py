"""What a comparison of a result with its reference gave."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from frameloom.ops.registry import BF16_SLACK, Rewrite, relative_error


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one comparison gave. `kept` None: it does not apply here, `note` says why."""

    name: str
    what: str
    promise: str
    max_abs: float | None = None
    relative: float | None = None
    psnr_db: float | None = None
    speedup: float | None = None
    kept: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """One word."""
        return {True: "kept", False: "BROKEN", None: "not here"}[self.kept]

    def record(self) -> dict[str, Any]:
        """For JSON, which knows no infinity and no NaN: they are None."""
        values = {name: None if _is_no_number(value) else value for name, value in asdict(self).items()}
        return {**values, "verdict": self.verdict}


def _is_no_number(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """A result against the reference in its dtype and in float32."""

    max_abs: float
    relative: float
    psnr_db: float
    relative_to_exact: float
    reference_to_exact: float

    @classmethod
    def of(cls, result: Tensor, reference: Tensor, exact: Tensor) -> "Errors":
        """`exact`: the reference computed in float32."""
        a, b, c = (tensor.double() for tensor in (result, reference, exact))
        mean_square = float((a - b).square().mean())
        span = float(b.max() - b.min())
        return cls(
            max_abs=float((a - b).abs().max()),
            relative=relative_error(a, b),
            psnr_db=10 * math.log10(span**2 / mean_square) if mean_square and span else math.inf,
            relative_to_exact=relative_error(a, c),
            reference_to_exact=relative_error(b, c),
        )

    def keeps(self, rewrite: Rewrite, dtype: torch.dtype) -> bool:
        """Whether the rewrite's promise holds; a NaN never does."""
        if rewrite.exactness == "bitwise":
            return self.max_abs == 0
        if rewrite.exactness == "lossy":
            return not math.isnan(self.relative)
        if dtype == torch.float32:
            return self.relative <= rewrite.tolerance
        return self.relative_to_exact <= BF16_SLACK * self.reference_to_exact
