"""A VAE that computes with the weights of somebody else, such as a live model's, and keeps no second copy of them."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from frameloom.engine.modules import set_attention
from frameloom.engine.vae import kernels_for
from frameloom.memory.vae import VaePlanner
from frameloom.models.meta import on_meta
from frameloom.models.spec import VaeSpec
from frameloom.models.vae_blocks import AttentionBlock, CausalConv3d, Kernel, Resample, RMSNorm
from frameloom.models.vae_fast import convolution_of, install, memory_orders, of_other_numbers
from frameloom.models.wan_vae import WanVAE
from frameloom.ops.registry import Policy
from frameloom.ops.winograd import bytes_at_points

_WORDS: Mapping[int, torch.dtype] = MappingProxyType({2: torch.int16, 4: torch.int32, 8: torch.int32})


class LentVae:
    """A network without weights of its own: `bind` gives it those of another, `unbind` takes them away.

    Weights that its kernels use in another memory order are brought into that order where they are, once, and `release`
    brings them back; those whose memory may be shared are copied at each binding instead. What kernels compute from
    weights (Winograd's points) is kept between one binding and the next, and made again where a weight has changed.
    Names and shapes are those of Diffusers' AutoencoderKLWan.
    """

    def __init__(self, spec: VaeSpec, policy: Policy, *, budget_bytes: int | None = None) -> None:
        self.spec = spec
        self._policy, self._budget_bytes = policy, budget_bytes
        with on_meta():
            self._vae = WanVAE(spec).eval()
        set_attention(self._vae, AttentionBlock, expected=2)
        self._modules = dict(self._vae.named_modules())
        self._slots = {name: _slot(self._vae, name) for name, _ in self._vae.named_parameters()}
        self._shapes = {name: parameter.shape for name, parameter in self._vae.named_parameters()}
        self._ways: dict[tuple[torch.device, torch.dtype], _Way] = {}
        self._made: dict[str, _Made] = {}
        self._stamps: dict[str, _Stamp] = {}
        self._lay: dict[str, _Lay] = {}
        self._empty()

    def misfit(self, weights: Mapping[str, Tensor]) -> str | None:
        """Why weights are not those of this network, or None."""
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes == self._shapes:
            return None
        for name in sorted(shapes.keys() | self._shapes.keys()):
            if shapes.get(name) != self._shapes.get(name):
                there, wanted = (str(list(x[name])) if name in x else "nothing" for x in (shapes, self._shapes))
                return f"{name} is {there}, and the config asks for {wanted}"
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def bind(self, weights: Mapping[str, Tensor]) -> tuple[WanVAE, VaePlanner]:
        """The network on these weights, all of one dtype and device, and the planner of its passages."""
        for name, (module, attribute) in self._slots.items():
            module._parameters[attribute] = weights[name]  # type: ignore[assignment]  # shared, whatever it is
        way = self._way(weights)
        for name, order in way.orders.items():
            self._bring(name, weights[name], order)
        self._stamps = {name: _Stamp.of(*self._of(name)) for name in way.computed}
        kept = {name: made for name, made in self._made.items() if name in way.computed}
        self._made = {name: made for name, made in kept.items() if made.stamp.is_that_of(self._stamps[name])}
        install(self._vae, way.planner.choices, {name: made.kernel for name, made in self._made.items()})
        return self._vae, way.planner

    def unbind(self, weights: Mapping[str, Tensor]) -> None:
        """Let the weights go, and keep what was computed of them."""
        try:
            self.keep(weights)
        finally:
            self._empty()

    def keep(self, weights: Mapping[str, Tensor]) -> None:
        """Keep what was computed of the weights that are bound, for the next binding."""
        for name, bound in self._stamps.items():
            module = self._modules[name]
            assert isinstance(module, CausalConv3d | Resample)
            if name not in self._made and module.kernel is not None and getattr(module.kernel, "is_prepared", True):
                prefix = _convolution_name(name, module)
                stamp = _Stamp.of(weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))
                if stamp.is_that_of(bound):  # else they were changed meanwhile
                    self._made[name] = _Made(kernel=module.kernel, stamp=stamp)

    def extra_bytes(self, weights: Mapping[str, Tensor]) -> int:
        """What the kernels will hold besides these weights when all of them have been used."""
        way = self._way(weights)
        return sum(way.computed.values())

    def forget(self) -> None:
        """Let go what was computed of weights."""
        self._made.clear()

    @property
    def moved(self) -> Set[str]:
        """Names of the weights that were brought into another memory order."""
        return self._lay.keys()

    @torch.inference_mode(False)
    @torch.no_grad()
    def release(self, weights: Mapping[str, Tensor]) -> None:
        """Bring those of `moved` back into the memory order they had, and let all else go."""
        self.forget()
        self._empty()
        for name, lay in self._lay.items():
            weight = weights.get(name)
            if weight is not None and _is_in(weight, lay.order):
                weight.data = torch.empty_strided(
                    weight.shape, lay.stride, dtype=weight.dtype, device=weight.device
                ).copy_(weight)
        self._lay.clear()

    def _way(self, weights: Mapping[str, Tensor]) -> "_Way":
        """How they are computed with where they are, found out once; `weights` are those that are bound."""
        first = weights[next(iter(self._slots))]
        key = (first.device, first.dtype)
        if key not in self._ways:
            planner = kernels_for(self._vae, policy=self._policy, budget_bytes=self._budget_bytes)
            computed = {name: _computed_bytes(self._modules[name]) for name in of_other_numbers(planner.choices)}
            orders = memory_orders(self._vae, planner.choices)
            self._ways[key] = _Way(planner=planner, orders=orders, computed=computed)
        return self._ways[key]

    def _bring(self, name: str, weight: Tensor, order: tuple[int, ...]) -> None:
        """Into another memory order in its place.

        What lies in no plain order, or in memory that is not its own alone, is left to the kernel, which copies.
        """
        if _is_in(weight, order) or weight.is_inference() or not (weight.is_contiguous() or name in self._lay):
            return
        if _may_be_shared(weight):
            return
        stride = self._lay[name].stride if name in self._lay else weight.stride()
        self._lay[name] = _Lay(stride=stride, order=order)
        weight.data = weight.detach().permute(order).contiguous().permute(_inverse(order))

    def _of(self, name: str) -> tuple[Tensor, Tensor | None]:
        conv = convolution_of(self._modules[name])
        return conv.weight, conv.bias

    def _empty(self) -> None:
        for module, attribute in self._slots.values():
            module._parameters[attribute] = None
        for module in self._modules.values():  # nn.Module's own way to set is slow
            if isinstance(module, CausalConv3d | Resample):
                vars(module)["kernel"] = None
            elif isinstance(module, RMSNorm):
                vars(module)["fused"] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """How weights of one dtype on one device are computed with; `computed`: bytes of what kernels make of them."""

    planner: VaePlanner
    orders: Mapping[str, tuple[int, ...]]
    computed: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lay:
    """The strides that a weight had, and the order it was brought into."""

    stride: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Stamp:
    """By what a change of a weight and its bias is told: their place, and sums over the bits of all their numbers.

    torch counts neither the changes by way of `.data`, such as those of adapters that are fused into weights, nor those
    of fused optimizers.
    """

    places: tuple[object, ...]
    sums: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, *tensors: Tensor | None) -> "_Stamp":
        there = [tensor.detach() for tensor in tensors if tensor is not None]
        places = tuple((x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) for x in there)
        return cls(places=places, sums=tuple(map(_sums_of_bits, there)))

    def is_that_of(self, other: "_Stamp") -> bool:
        """Whether nothing has changed from the one to the other."""
        return other.places == self.places and all(map(torch.equal, other.sums, self.sums))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Made:
    """A kernel with other numbers than the weight, and what tells that they are still those of the weight."""

    kernel: Kernel
    stamp: _Stamp


def _slot(vae: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return vae.get_submodule(parent), attribute


def _convolution_name(name: str, module: nn.Module) -> str:
    return f"{name}.resample.1" if isinstance(module, Resample) else name


def _computed_bytes(module: nn.Module) -> int:
    """At most; of the points, which are larger than all else that is made of a weight."""
    return bytes_at_points(convolution_of(module).weight)


def _sums_of_bits(x: Tensor) -> Tensor:
    """Sums of x's bits as whole numbers, over the rows and over the columns of a table as they lie in memory.

    Modulo 2**64. Changes are seen unless they cancel out in every row and in every column, so any single one is.
    """
    flat = x.as_strided((x.numel(),), (1,)) if _span(x) == x.numel() else x.reshape(-1).contiguous()
    row_bytes = x.numel() // x.shape[0] * x.element_size()
    is_whole = row_bytes % 8 == flat.data_ptr() % 8 == flat.storage_offset() * x.element_size() % 8 == 0
    table = flat.view(torch.int64 if is_whole else _WORDS[x.element_size()]).view(x.shape[0], -1)
    return torch.cat([table.sum(dim=dim, dtype=torch.int64) for dim in (0, 1)])


def _span(x: Tensor) -> int:
    """Numbers from the first to the last one in memory: as many as there are where x has no gaps."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _is_in(x: Tensor, order: tuple[int, ...]) -> bool:
    return x.permute(order).is_contiguous()


def _may_be_shared(x: Tensor) -> bool:
    """Whether its memory may be seen elsewhere: by other processes or devices, or through views of one buffer.

    torch calls all of a GPU's memory shared.
    """
    is_hosts = x.device.type == "cpu" and (x.is_shared() or x.is_pinned())  # type: ignore[no-untyped-call]
    return is_hosts or x.untyped_storage().nbytes() > x.numel() * x.element_size()


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]
