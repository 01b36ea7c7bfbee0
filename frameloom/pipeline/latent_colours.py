"""What colour a latent cell has, about: one linear map for each VAE that is known, for previews.

Numbers of the Wan VAEs: `latent_rgb_factors` of ComfyUI (comfy/latent_formats.py, classes Wan21 and Wan22), of latents
normalised as the sampler sees them. Those of the built-in model: `python -m frameloom.shapes.fit_colours`.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from frameloom.models.spec import VaeSpec

Row = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentColours:
    """`rows`: what each channel adds to red, green and blue, in [-1, 1]; the last one is added to every cell.

    With `side` 3 a cell's colour also depends on its neighbours: the rows of the channels of the one above to the left,
    then of the one above, and so on. `means`: of the first channels in the VAE's config, by which it is known.
    """

    means: Row
    rows: tuple[Row, ...]
    side: int = 1

    def frames(self, z_CTHW: Tensor) -> Tensor:
        """Colours of normalised latents: uint8 (T, H, W, 3), a pixel for each cell, on the host."""
        *factors, bias = torch.tensor(self.rows, dtype=torch.float32).unbind()
        near_NTHW = with_neighbours(z_CTHW.to("cpu", torch.float32), self.side)
        x_THWC = near_NTHW.permute(1, 2, 3, 0) @ torch.stack(factors) + bias
        return x_THWC.add(1).mul(127.5).nan_to_num(nan=0.0).clamp(0, 255).round().to(torch.uint8)


def with_neighbours(z_CTHW: Tensor, side: int) -> Tensor:
    """The channels of a cell and of those around it, (side · side · C, T, H, W); at the edges the last ones repeat."""
    height, width = z_CTHW.shape[2:]
    padded = F.pad(z_CTHW, (side // 2,) * 4, mode="replicate")
    return torch.cat([padded[:, :, i : i + height, j : j + width] for i in range(side) for j in range(side)])


def colours_of(spec: VaeSpec) -> LatentColours | None:
    """The map for the latents of a VAE; None for one that is not known."""
    for known in _KNOWN:
        near = all(abs(a - b) < _APART for a, b in zip(known.means, spec.latents_mean, strict=False))
        if near and len(known.rows) == known.side**2 * spec.z_dim + 1:
            return known
    return None


_APART: Final = 1e-3  # configs are written with four digits or more
_KNOWN: Final = (
    LatentColours(  # Wan 2.1, and the A14B models of 2.2
        means=(-0.7571, -0.7089, -0.9113),
        rows=(
            (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
            (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925),
            (0.0166, 0.1902, 0.1975),
            (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
            (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
            (-0.1835, -0.0868, -0.3360),
        ),
    ),
    LatentColours(  # Wan 2.2 TI2V-5B
        means=(-0.2289, -0.0052, -0.1323),
        rows=(
            (0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165), (0.0140, 0.0409, 0.0491), (-0.0813, -0.0677, 0.0607),
            (0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912), (0.0295, 0.0326, 0.0590), (-0.0244, -0.0270, 0.0025),
            (0.0443, -0.0102, 0.0288), (-0.0465, -0.0090, -0.0205), (0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048),
            (0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418), (-0.0319, -0.0542, -0.0637), (-0.0268, 0.0024, 0.0260),
            (0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287), (-0.0285, -0.1032, -0.1237),
            (0.1041, 0.0537, 0.0622),
            (-0.0086, -0.0374, -0.0051), (0.0390, 0.0670, 0.2863), (0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079),
            (0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481), (0.0714, 0.0827, 0.0447),
            (-0.0304, -0.0574, -0.0196), (0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014),
            (0.0568, 0.1307, 0.1372),
            (-0.0055, -0.0310, -0.0380), (0.0239, -0.0305, 0.0325), (-0.0663, -0.0673, -0.0140),
            (-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093), (-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.2250),
            (-0.0368, 0.0370, 0.0295), (-0.3441, -0.3543, -0.2008), (-0.0479, -0.0489, -0.0420),
            (-0.0660, -0.0153, 0.0800), (-0.0101, 0.0068, 0.0156), (-0.0690, -0.0452, -0.0927),
            (-0.0145, 0.0041, 0.0015),
            (0.0421, 0.0451, 0.0373), (0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055), (0.0317, -0.0878, -0.1388),
        ),
    ),
    LatentColours(  # the built-in model
        means=(0.3519, -0.1594, -0.2933),
        side=3,
        rows=(
            (0.303, 0.024, 0.238), (0.264, 0.050, 0.185), (0.341, 0.042, 0.286), (0.144, 0.083, 0.073),
            (0.244, 0.005, 0.220), (-0.014, 0.011, -0.031), (0.256, -0.062, 0.345), (-0.723, -0.067, -0.667),
            (0.167, 0.020, -0.051), (0.148, 0.019, -0.026), (0.182, -0.002, -0.053), (0.146, 0.066, -0.086),
            (0.124, -0.028, 0.003), (0.000, -0.002, 0.016), (0.152, 0.026, -0.024), (-0.385, 0.040, 0.078),
            (-0.047, -0.087, -0.088), (-0.032, -0.084, -0.058), (-0.064, -0.112, -0.113), (-0.029, -0.097, -0.060),
            (-0.045, -0.062, -0.079), (-0.007, 0.024, 0.019), (-0.049, -0.157, -0.040), (0.082, 0.188, 0.184),
            (0.086, -0.170, 0.157), (0.088, -0.090, 0.085), (0.078, -0.198, 0.158), (0.075, -0.101, 0.041),
            (0.075, -0.131, 0.130), (0.019, 0.026, -0.009), (0.067, -0.245, 0.240), (-0.152, 0.381, -0.312),
            (0.092, -0.050, -0.207), (0.066, -0.012, -0.104), (0.157, -0.099, -0.207), (0.156, -0.080, -0.524),
            (0.087, -0.128, -0.116), (-0.021, -0.005, -0.009), (-0.016, -0.134, -0.219), (-0.658, 0.124, 0.439),
            (0.053, -0.132, 0.021), (0.043, -0.107, 0.027), (0.046, -0.166, 0.016), (0.052, -0.160, -0.002),
            (0.035, -0.111, 0.035), (-0.016, 0.014, 0.009), (0.065, -0.159, -0.003), (-0.156, 0.317, -0.086),
            (0.165, -0.054, 0.018), (0.126, -0.023, 0.000), (0.168, -0.074, 0.022), (0.088, 0.048, -0.001),
            (0.092, -0.065, 0.012), (-0.016, 0.006, 0.009), (0.180, -0.057, 0.056), (-0.378, 0.096, -0.080),
            (0.021, -0.150, -0.052), (0.027, -0.086, -0.066), (0.022, -0.156, -0.083), (-0.001, -0.122, -0.074),
            (0.031, -0.096, -0.073), (0.013, 0.013, -0.006), (-0.006, -0.217, 0.017), (-0.045, 0.309, 0.147),
            (-0.073, 0.154, -0.223), (-0.053, 0.129, -0.187), (-0.078, 0.163, -0.252), (-0.093, 0.109, -0.191),
            (-0.032, 0.110, -0.154), (-0.010, 0.003, 0.022), (-0.087, 0.155, -0.236), (0.133, -0.337, 0.472),
            (0.071, 0.024, 0.026),
        ),
    ),
)  # fmt: skip
