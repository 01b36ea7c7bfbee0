"""What devices that are not here can do, by the data sheets of their makers: memory, rates, links.

Rates are those of dense products without sparsity, accumulated in float32. What a network reaches of them is another
matter: `memory/plan.py` says how much is assumed. Links: bytes per second in one direction.
"""

import difflib
import re
from dataclasses import dataclass

from frameloom.errors import RequestError

_GB = 10**9
_GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """A device: memory in bytes, products in FLOP/s, memory and links in bytes per second.

    `link_bytes_per_s`: to the host; `peer_bytes_per_s`: to another one beside it. `platform`: a name of `PLATFORMS`.
    """

    name: str
    memory_bytes: int
    bfloat16: float
    float16: float
    float32: float
    bandwidth_bytes_per_s: float
    link_bytes_per_s: float
    peer_bytes_per_s: float
    platform: str = "cuda"


def _spec(
    name: str, memory_bytes: int, bandwidth: float, half: float, single: float, *,
    link: float = 25, peer: float = 20, platform: str = "cuda", bfloat16: float | None = None,
) -> DeviceSpec:  # fmt: skip
    """Rates in TFLOP/s, bandwidth and links in GB/s."""
    return DeviceSpec(
        name=name,
        memory_bytes=memory_bytes,
        bfloat16=(half if bfloat16 is None else bfloat16) * _TERA,
        float16=half * _TERA,
        float32=single * _TERA,
        bandwidth_bytes_per_s=bandwidth * _GB,
        link_bytes_per_s=link * _GB,
        peer_bytes_per_s=peer * _GB,
        platform=platform,
    )


# Links to the host: PCIe 4.0 x16 about 25 GB/s, 5.0 about 50, 3.0 about 12, x8 half of that. float32 of NVIDIA's cards
# is without TF32. Memory is what the maker calls the size, some of which drivers keep for themselves.
SPECS: tuple[DeviceSpec, ...] = (
    _spec("B200", 180 * _GB, 7700, 2250, 75, link=50, peer=900),  # NVIDIA Blackwell data sheet, dense
    _spec("H200", 141 * _GB, 4800, 989, 67, link=50, peer=450),  # NVIDIA H200 data sheet, SXM
    _spec("H100", 80 * _GIB, 3350, 989, 67, link=50, peer=450),  # NVIDIA H100 data sheet, SXM
    _spec("H100 PCIe", 80 * _GIB, 2000, 756, 51, link=50, peer=40),  # the same, PCIe
    _spec("H20", 96 * _GB, 4000, 148, 44, link=50, peer=450),  # NVIDIA H20 specification
    _spec("A100 80GB", 80 * _GIB, 2039, 312, 19.5, peer=300),  # NVIDIA A100 data sheet, SXM
    _spec("A100", 40 * _GIB, 1555, 312, 19.5, peer=300),  # the same, 40 GB
    _spec("L40S", 48 * _GIB, 864, 362, 91.6),  # NVIDIA L40S data sheet
    _spec("L4", 24 * _GIB, 300, 121, 30.3),  # NVIDIA L4 data sheet
    _spec("A10G", 24 * _GIB, 600, 70, 31.2),  # NVIDIA A10 data sheet, as clouds run it
    _spec("V100", 32 * _GIB, 900, 125, 15.7, link=12, peer=150, bfloat16=0),  # NVIDIA V100 data sheet: no bfloat16
    _spec("T4", 16 * _GIB, 320, 65, 8.1, link=12, peer=10, bfloat16=0),  # NVIDIA T4 data sheet: no bfloat16
    # GeForce: NVIDIA's architecture white papers (Ampere, Ada, Blackwell), halves with float32 accumulation.
    _spec("RTX 5090", 32 * _GIB, 1792, 209.5, 104.8, link=50),
    _spec("RTX 5080", 16 * _GIB, 960, 112.6, 56.3, link=50),
    _spec("RTX 4090", 24 * _GIB, 1008, 165.2, 82.6),
    _spec("RTX 4080", 16 * _GIB, 717, 97.5, 48.7),
    _spec("RTX 4070", 12 * _GIB, 504, 58.3, 29.1),
    _spec("RTX 4060 Ti 16GB", 16 * _GIB, 288, 44.1, 22.1, link=12),
    _spec("RTX 3090", 24 * _GIB, 936, 71, 35.6),
    _spec("RTX 3060", 12 * _GIB, 360, 25.3, 12.7),
    _spec("RTX A6000", 48 * _GIB, 768, 154.8, 38.7),  # NVIDIA RTX A6000 data sheet
    _spec("RTX 6000 Ada", 48 * _GIB, 960, 364, 91.1),  # NVIDIA RTX 6000 Ada data sheet
    _spec("MI300X", 192 * _GB, 5300, 1307, 163.4, link=50, peer=64, platform="rocm"),  # AMD MI300X data sheet
    _spec("MI250X", 128 * _GB, 3277, 383, 95.7, peer=50, platform="rocm"),  # AMD MI250X data sheet, both dies
    _spec("RX 7900 XTX", 24 * _GIB, 960, 122.8, 61.4, platform="rocm"),  # AMD RX 7900 XTX specification
    # Apple's chips share memory between CPU and GPU: three quarters are for Metal. Rates: 2 x lanes x clock.
    _spec("M2 Max", 48 * _GIB, 400, 13.6, 13.6, link=400, platform="mps"),
    _spec("M3 Max", 48 * _GIB, 400, 14.2, 14.2, link=400, platform="mps"),
    _spec("M4 Max", 48 * _GIB, 546, 18.4, 18.4, link=546, platform="mps"),
)


def spec_of(name: str) -> DeviceSpec:
    """The device called so: "H100", "rtx 4090", "4090", "4060ti 16gb". Raises RequestError with the nearest name."""
    known = {_plain(spec.name): spec for spec in SPECS}
    found = known.get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(_plain(name), known, n=1)
        hint = f"did you mean {known[near[0]].name!r}? " if near else ""
        raise RequestError(
            f"nothing is known of a device {name!r}; {hint}use auto for this machine, or one of "
            f"{', '.join(spec.name for spec in SPECS)}"
        )
    return found


def _plain(name: str) -> str:
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|amd|apple|geforce|rtx|rx)+", "", letters)
