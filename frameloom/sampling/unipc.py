"""UniPC, Wan's multistep predictor-corrector (arXiv:2302.04867), and the sampler that a config asks for.

Reference: diffusers UniPCMultistepScheduler with predict_x0, flow sigmas and a final sigma of zero.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from frameloom.errors import CheckpointError
from frameloom.sampling.flow import (
    Euler,
    FlowSchedule,
    Sampler,
    SamplerState,
    distilled_schedule,
    euler_schedule,
    unipc_schedule,
)

SolverType = Literal["bh1", "bh2"]
_ORDERS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Update:
    """One multistep update in numbers: x moves along the newest clean estimate m0, plus differences to it.

    x' = scale_x x - scale_m m0 - scale_d (sum_k rhos[k] (m_k - m0) / ratios[k] + rho_new (m_new - m0))
    Each a float32 tensor () on the host: no device waits for it, and it rounds where the reference's does.
    """

    scale_x: Tensor
    scale_m: Tensor
    scale_d: Tensor
    ratios: tuple[Tensor, ...]
    rhos: tuple[Tensor, ...] = ()
    rho_new: Tensor | None = None

    def apply(self, x: Tensor, estimates: Sequence[Tensor], *, new: Tensor | None = None) -> Tensor:
        """`estimates`: clean estimates of one dtype, newest first; `new`: that at the target level (corrector only).

        In place where nobody else holds a tensor, each is as large as the video; and coefficients stand on the left:
        there the CPU rounds them to bf16.
        """
        m0 = estimates[0]
        moved = (self.scale_x * x).to(m0.dtype).sub_(self.scale_m * m0)
        correction = None
        for term in self._terms(estimates, new):
            correction = term if correction is None else correction.add_(term)
        if correction is not None:
            moved.sub_(self.scale_d * correction)
        return moved.to(x.dtype)

    def _terms(self, estimates: Sequence[Tensor], new: Tensor | None) -> Iterator[Tensor]:
        """What each estimate beside m0 adds, before it is scaled."""
        m0 = estimates[0]
        older = zip(self.rhos, self.ratios, estimates[1:], strict=False)  # history may exceed the order
        for rho, ratio, m in older:
            yield rho * (m - m0).div_(ratio)
        if new is not None and self.rho_new is not None:
            yield self.rho_new * (new - m0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Step:
    sigma: Tensor  # as in _Update
    corrector: _Update | None
    predictor: _Update


class UniPC:
    """Predicts the next latents from up to `order` clean estimates, corrects them with the one made there.

    The first steps use the estimates there are, the last go down to order 1 (lower_order_final).
    `order`: 1..3. `disable_corrector`: steps whose result is not corrected. History: `sample`, `x0_0`
    (newest) to `x0_{order-1}`. Every coefficient is computed here, in float32 on the host, as the reference
    does on the CPU. With `bh1` the reference's last step is NaN (infinity times zero); here it is not.
    """

    def __init__(
        self,
        schedule: FlowSchedule,
        *,
        order: int = 2,
        solver_type: SolverType = "bh2",
        disable_corrector: Collection[int] = (),
    ) -> None:
        self.schedule = schedule
        self._order = order
        skipped = sorted(set(disable_corrector))
        self._name = (
            f"UniPC {solver_type} order {order}, {schedule.num_steps} steps, sigmas {schedule.digest}, "
            f"uncorrected {skipped}"
        )
        orders = [min(order, i + 1, schedule.num_steps - i) for i in range(schedule.num_steps)]
        predictors = [_predictor(schedule.sigmas, i, order=p, solver_type=solver_type) for i, p in enumerate(orders)]
        correctors = [
            None if i in skipped else _corrector(schedule.sigmas, i, order=p, solver_type=solver_type)
            for i, p in enumerate(orders[:-1])
        ]
        self._steps = tuple(
            _Step(sigma=sigma, corrector=corrector, predictor=predictor)
            for sigma, corrector, predictor in zip(
                schedule.sigmas[:-1].unbind(), [None, *correctors], predictors, strict=True
            )
        )

    def start(self) -> SamplerState:
        """The state before the first step, with an empty history."""
        return SamplerState(step=0, sampler=self._name)

    def step(self, velocity: Tensor, latents: Tensor, state: SamplerState) -> tuple[Tensor, SamplerState]:
        """See Sampler.step. The latents keep their dtype; a bf16 velocity on float32 latents is usual."""
        state.check(sampler=self._name, num_steps=self.schedule.num_steps, latents=latents)
        step = self._steps[state.step]
        # sigma on the left: there the CPU rounds it to the dtype of a bf16 velocity, as in the reference
        x0 = latents - step.sigma * velocity
        del velocity  # the caller may have let go of it
        past = self._estimates(state)
        if step.corrector is not None:
            latents = step.corrector.apply(state.history["sample"], past, new=x0)
        recent = (x0, *past)[: self._order]
        moved = step.predictor.apply(latents, recent)
        history = {"sample": latents} | {f"x0_{age}": m for age, m in enumerate(recent)}
        return moved, replace(state, step=state.step + 1, history=history)

    def _estimates(self, state: SamplerState) -> tuple[Tensor, ...]:
        """Clean estimates of the steps before, newest first."""
        names = [f"x0_{age}" for age in range(min(self._order, state.step))]
        if not state.history.keys() >= {*names, *(["sample"] if names else [])}:
            raise CheckpointError(f"the state to continue from lacks one of 'sample', {names}; start the run again")
        return tuple(state.history[name] for name in names)


def _predictor(sigmas: Tensor, start: int, *, order: int, solver_type: SolverType) -> _Update:
    """UniP from sigmas[start] to sigmas[start + 1], from estimates only at `start` and before."""
    update, matrix, rhs = _system(sigmas, start, order=order, solver_type=solver_type)
    if order < 3:
        rhos = tuple(torch.full_like(rhs[1:order], 0.5))  # the paper's simplification of order 2
    else:
        rhos = torch.linalg.solve(matrix[:-1, :-1], rhs[:-1]).unbind()
    return replace(update, rhos=rhos)


def _corrector(sigmas: Tensor, start: int, *, order: int, solver_type: SolverType) -> _Update:
    """UniC over the same interval, with the estimate at sigmas[start + 1] added."""
    update, matrix, rhs = _system(sigmas, start, order=order, solver_type=solver_type)
    *rhos, rho_new = [torch.full_like(rhs[0], 0.5)] if order == 1 else torch.linalg.solve(matrix, rhs).unbind()
    return replace(update, rhos=tuple(rhos), rho_new=rho_new)


def _system(sigmas: Tensor, start: int, *, order: int, solver_type: SolverType) -> tuple[_Update, Tensor, Tensor]:
    """The update without its rhos, and the linear system (order, order), (order,) that gives them.

    float32 tensors on the host, rounded where the reference rounds.
    """
    sigma_s, sigma_t = sigmas[start], sigmas[start + 1]
    lambda_s = _half_log_snr(sigma_s)
    h = _half_log_snr(sigma_t) - lambda_s
    ratios = [(_half_log_snr(sigmas[start - k]) - lambda_s) / h for k in range(1, order)]
    nodes = torch.stack([*ratios, torch.ones_like(h)])
    phi_1 = torch.expm1(-h)
    b_h = -h if solver_type == "bh1" else phi_1
    update = _Update(
        scale_x=sigma_t / sigma_s,
        scale_m=(1 - sigma_t) * phi_1,
        scale_d=(1 - sigma_t) * b_h,
        ratios=tuple(ratios),
    )
    matrix = torch.stack([torch.pow(nodes, power) for power in range(order)])
    return update, matrix, _right_hand_side(-h, b_h, phi_1=phi_1, order=order)


def _right_hand_side(hh: Tensor, b_h: Tensor, *, phi_1: Tensor, order: int) -> Tensor:
    """n! * hh * phi_{n+1}(hh) / B(h) for n = 1..order, by the recursion phi_{n+1} = (phi_n - 1/n!) / hh."""
    phi = phi_1 / hh - 1
    factorial = 1
    rows = []
    for n in range(1, order + 1):
        rows.append(phi * factorial / b_h)
        factorial *= n + 1
        phi = phi / hh - 1 / factorial
    return torch.stack(rows)


def _half_log_snr(sigma: Tensor) -> Tensor:
    return torch.log(1 - sigma) - torch.log(sigma)


# Every option of the two reference schedulers -> (the value an absent key has, the values computed here).
# None: any value; it is read below, or it cannot change a flow schedule.
_Options = Mapping[str, tuple[Any, tuple[Any, ...] | None]]
_SHARED: _Options = {
    "num_train_timesteps": (1000, None),
    "use_dynamic_shifting": (False, (False,)),
    "shift_terminal": (None, (None,)),
    "use_karras_sigmas": (False, (False,)),
    "use_exponential_sigmas": (False, (False,)),
    "use_beta_sigmas": (False, (False,)),
    "time_shift_type": ("exponential", None),
}
_UNIPC: _Options = {
    **_SHARED,
    "flow_shift": (1.0, None),
    "solver_order": (2, _ORDERS),
    "solver_type": ("bh2", (*get_args(SolverType), "midpoint", "heun", "logrho")),
    "prediction_type": ("epsilon", ("flow_prediction",)),
    "use_flow_sigmas": (False, (True,)),
    "predict_x0": (True, (True,)),
    "lower_order_final": (True, (True,)),  # False divides by zero at the final sigma of zero
    "final_sigmas_type": ("zero", ("zero",)),
    "disable_corrector": ([], None),
    "thresholding": (False, (False,)),
    "solver_p": (None, (None,)),
    "timestep_spacing": ("linspace", None),
    "steps_offset": (0, None),
    "beta_start": (0.0001, None),
    "beta_end": (0.02, None),
    "beta_schedule": ("linear", None),
    "trained_betas": (None, None),
    "rescale_betas_zero_snr": (False, None),
    "dynamic_thresholding_ratio": (0.995, None),
    "sample_max_value": (1.0, None),
    "sigma_min": (None, None),
    "sigma_max": (None, None),
}
_EULER: _Options = {
    **_SHARED,
    "shift": (1.0, None),
    "even_levels": (False, (False, True)),  # not Diffusers': see distilled_schedule
    "invert_sigmas": (False, (False,)),
    "stochastic_sampling": (False, (False,)),
    "base_shift": (0.5, None),
    "max_shift": (1.15, None),
    "base_image_seq_len": (256, None),
    "max_image_seq_len": (4096, None),
}
_CLASSES: Mapping[str, _Options] = {
    "UniPCMultistepScheduler": _UNIPC,
    "FlowMatchEulerDiscreteScheduler": _EULER,
}
_WHERE = "scheduler_config.json"


def make_sampler(
    config: Mapping[str, Any], num_steps: int, *, flow_shift: float | None = None, skipped: int = 0
) -> Sampler:
    """The sampler that a Diffusers scheduler_config.json describes, for `num_steps` steps without the first `skipped`.

    `flow_shift` replaces the config's own shift (`flow_shift` of UniPC, `shift` of Euler). Options of the
    other class, which Diffusers leaves behind when a scheduler is swapped, are ignored as it ignores them.
    Raises CheckpointError for a class, option or value that is not computed here, RequestError for
    num_steps < 1 or a flow_shift that is not positive.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise CheckpointError(
            f"{_WHERE} asks for the scheduler class {name!r}; supported are {' and '.join(_CLASSES)}, "
            f"the nearest is {_nearest(name, _CLASSES)}"
        )
    options = _read(config, class_name=name)
    train_steps = int(_positive(options, "num_train_timesteps", kinds=(int,)))
    if name == "FlowMatchEulerDiscreteScheduler":
        shift = _positive(options, "shift") if flow_shift is None else flow_shift
        schedule_of = distilled_schedule if options["even_levels"] else euler_schedule
        return Euler(schedule_of(num_steps, shift=shift, num_train_timesteps=train_steps).after(skipped))
    shift = _positive(options, "flow_shift") if flow_shift is None else flow_shift
    return UniPC(
        unipc_schedule(num_steps, shift=shift, num_train_timesteps=train_steps).after(skipped),
        order=int(options["solver_order"]),
        # the reference reads the names of DPM-Solver's variants as bh2
        solver_type="bh1" if options["solver_type"] == "bh1" else "bh2",
        disable_corrector=[step - skipped for step in _step_numbers(options["disable_corrector"])],
    )


def _read(config: Mapping[str, Any], *, class_name: str) -> dict[str, Any]:
    """Every option of the class, absent ones at the reference's default; each checked."""
    known = _CLASSES[class_name]
    for key in config:
        if not (key.startswith("_") or any(key in options for options in _CLASSES.values())):
            raise CheckpointError(
                f"{_WHERE} has the option '{key}', which {class_name} does not know; "
                f"remove it or use the nearest, '{_nearest(key, known)}'"
            )
    options = {key: config.get(key, default) for key, (default, _) in known.items()}
    for key, (_, allowed) in known.items():
        if allowed is not None and options[key] not in allowed:
            said = "has" if key in config else "leaves out, and so means,"
            raise CheckpointError(
                f"{_WHERE} {said} {key}={options[key]!r}; with {class_name} only "
                f"{' or '.join(map(repr, allowed))} is supported, use that"
            )
    return options


def _nearest(name: object, known: Collection[str]) -> str:
    return difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]


_LARGEST = 1_000_000  # of any number in the config


def _positive(
    options: Mapping[str, Any], key: str, *, kinds: tuple[type[int] | type[float], ...] = (int, float)
) -> float:
    value: Any = options[key]
    if isinstance(value, kinds) and not isinstance(value, bool) and 0 < value <= _LARGEST:
        return float(value)
    noun = "number" if float in kinds else "whole number"
    raise CheckpointError(f"{_WHERE} has {key}={value!r}; it must be a positive {noun} up to {_LARGEST}")


def _step_numbers(value: object) -> tuple[int, ...]:
    if isinstance(value, list | tuple) and all(isinstance(step, int) for step in value):
        return tuple(value)
    raise CheckpointError(f"{_WHERE} has disable_corrector={value!r}; it must be a list of step numbers such as [0, 1]")
