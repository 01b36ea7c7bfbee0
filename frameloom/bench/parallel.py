"""How a step and a decode scale over 1, 2, 4, ... ranks: `frameloom bench parallel`. Random weights, released configs.

Every measurement is a start of its ranks, and their numbers take turns from round to round: ranks of two numbers that
lived beside each other would use the same cores and the same memory. The first run of a start is not counted.
CPU seconds, of the busiest rank, tell what was computed from what was waited for, on others of the machine too.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frameloom.bench.dit import CONFIGS as DITS
from frameloom.bench.paired import check_size, check_words, machine
from frameloom.bench.vae import CONFIGS as VAES
from frameloom.config import parallel_plan
from frameloom.engine.dit import make_fast_dit
from frameloom.engine.ranks import Ranks, gather_ranks, own_device
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import make_fast
from frameloom.errors import InternalError, RequestError
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vae_blocks import Resample
from frameloom.models.vae_fast import prepare
from frameloom.models.wan_dit import WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.parallel.cost import Link, Network, RankCost, predicted_s
from frameloom.parallel.launch import MAX_RANKS, run_ranks
from frameloom.parallel.link import measure_link
from frameloom.parallel.pass_cost import VaeWork, margin_costs, pass_costs
from frameloom.parallel.step_cost import StepWork, step_costs
from frameloom.parallel.vae_passage import SharedPassage
from frameloom.pipeline import stages
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import DTYPES, peak_memory_bytes, reset_peak_memory, timed
from frameloom.settings import Launched, launched
from frameloom.types import ParallelPlan

STAGES = ("denoise", "decode")
_SPACE = {"5B": 16, "2.2": 16}  # pixels of a latent cell; 8 for the others
_TEXT_TOKENS, _PROMPT_LENGTHS = 512, (30, 120)
_RUNS = 2  # timed, after the first
_RANK_FIELDS = ("dit", "vae", "dtype", "device")
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelCase:
    """One table. `layers` None: all there are; `parallel`: the plan of every number of ranks but 1.

    `threads` of each rank, however many there are; None: the cores, shared by the most ranks. `record_to`: where the
    first of the ranks that were started writes its record.
    """

    ranks: tuple[int, ...] = (1, 2)
    stages: tuple[str, ...] = STAGES
    dit: str = "1.3B"
    layers: int | None = 2
    vae: str = "2.1"
    height: int = 240
    width: int = 416
    frames: int = 17
    dtype: str = "float32"
    guided: bool = True
    parallel: str = "auto"
    device: str = "auto"
    threads: int | None = None
    rounds: int = 3
    record_to: str | None = None

    def check(self) -> None:
        """Raise RequestError for what cannot be run."""
        check_words(self, {"dit": DITS, "vae": VAES, "dtype": ("float32", "bfloat16")})
        check_size(self, multiple=32 if "5B" in self.dit else 16, reason="VAE x patch")
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise RequestError(f"stages {','.join(self.stages)!r} are not possible; use {' or '.join(STAGES)}, or both")
        for name, value in (("layers", self.layers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise RequestError(f"{value} {name} compute nothing; use 1 or more")
        if not all(1 <= count <= MAX_RANKS for count in self.ranks) or 1 not in self.ranks:
            asked = ",".join(map(str, self.ranks))
            raise RequestError(f"ranks {asked} are not possible; use 1 and others up to {MAX_RANKS}, such as 1,2,4")
        for count in self.ranks:
            self.plan(count)

    def plan(self, count: int) -> ParallelPlan | None:
        """How so many ranks divide the work; None: as the checkpoint and their number suggest."""
        plan = parallel_plan("auto" if count == 1 else self.parallel, count)
        if plan is not None and plan.fsdp > 1:
            raise RequestError(f"fsdp={plan.fsdp} is not measured here; leave fsdp out")
        return plan

    @property
    def spec(self) -> TransformerSpec:
        """The transformer's."""
        config = dict(DITS[self.dit])
        return TransformerSpec(**(config if self.layers is None else {**config, "num_layers": self.layers}))

    @property
    def vae_spec(self) -> VaeSpec:
        """The VAE's."""
        return VaeSpec.from_config(dict(VAES[self.vae]))

    def cells(self, stage: str) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents."""
        space = _SPACE.get(self.dit if stage == "denoise" else self.vae, 8)
        return 1 + (self.frames - 1) // 4, self.height // space, self.width // space


def run_parallel(case: ParallelCase) -> dict[str, Any]:
    """The whole table; in a process that was started as one of several, the measurement of their number alone."""
    place = launched()
    if place is not None:
        case = replace(case, ranks=(1, place.world_size))
    case.check()
    if place is not None:
        return _measure(case, place)
    started: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for _, stage, count in itertools.product(range(case.rounds), case.stages, case.ranks):
        started[stage, count].append(_start(case, stage, count))
    return {
        "case": asdict(case),
        "threads": _threads(case),
        "cores": _cores(),
        "stages": {stage: _table(case, {n: started[stage, n] for n in case.ranks}) for stage in case.stages},
        "machine": next(iter(started.values()))[0]["machine"],
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads(case: ParallelCase) -> int:
    return case.threads or max(1, _cores() // max(case.ranks))


def _start(case: ParallelCase, stage: str, count: int) -> dict[str, Any]:
    """What so many ranks measured that were started for it."""
    words = {name: getattr(case, name) for name in _RANK_FIELDS}
    words |= {"size": f"{case.height}x{case.width}x{case.frames}", "threads": _threads(case), "stages": stage}
    words |= {"layers": case.layers} if case.layers else {}
    words |= {"parallel": case.parallel} if count > 1 else {}
    options = [text for name, value in words.items() for text in (f"--{name}", str(value))]
    try:
        safe = [] if sys.path[0] == os.getcwd() else ["-P"]  # as the command itself was started
    except FileNotFoundError:
        raise RequestError("the working folder has been removed; change to one that exists") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, *safe, "-m", "frameloom", "bench", "parallel", *options, "--record-to", str(path)]
        command += [] if case.guided else ["--no-guided"]
        outcome = run_ranks(command, count, say=sys.stderr.write)
        if outcome.code == RequestError.exit_code:
            raise RequestError(outcome.message)
        if outcome.code:
            raise InternalError(f"the measurement of {count} ranks failed: {outcome.message}")
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return record


# In each rank.


@torch.inference_mode()
def _measure(case: ParallelCase, place: Launched) -> dict[str, Any]:
    """Time the first of the stages on all ranks together; what the slowest one takes counts."""
    device, _ = own_device(case.device, place)
    if device.type == "cpu":
        keep_freed_memory()
        torch.set_num_threads(case.threads or torch.get_num_threads())
    plan = case.plan(place.world_size)
    facts = {"case": json.dumps({**asdict(case), "record_to": None})}
    ranks = gather_ranks(
        place, device, "auto" if plan is None else str(plan), spec=case.spec, guided=case.guided, weight_bytes=0,
        facts=facts,
    )  # fmt: skip
    run, facts_of_work = (_step if case.stages[0] == "denoise" else _decoding)(case, ranks)
    everyone = ranks.world.everyone
    link = None if ranks.alone else asdict(measure_link(everyone))
    reset_peak_memory(device)
    run()  # warms up, and reads the prompt
    seconds, sent, cpu_s = [], 0, 0.0
    for _ in range(_RUNS):
        everyone.least(0)  # all are ready
        before, cpu_before_s = ranks.world.sent_bytes, time.process_time()
        seconds.append(timed(run, device))
        sent, cpu_s = ranks.world.sent_bytes - before, time.process_time() - cpu_before_s
    numbers = [*seconds, cpu_s, sent, peak_memory_bytes(device)]
    found = torch.tensor(numbers, dtype=torch.float64, device=everyone.device)
    told = torch.stack(everyone.collect(found, [found.shape] * everyone.size)).tolist()
    record = {
        "ranks": everyone.size,
        "plan": asdict(ranks.plan),
        "work": facts_of_work,
        "seconds": [max(row[index] for row in told) for index in range(_RUNS)],
        "cpu_seconds": [row[-3] for row in told],
        "sent_bytes": [int(row[-2]) for row in told],
        "peak_bytes": [int(row[-1]) for row in told],
        "link": link,
        "machine": machine(device),
    }
    if case.record_to and ranks.world.rank == 0:
        Path(case.record_to).write_text(json.dumps(record), encoding="utf-8")
    return record


def _step(case: ParallelCase, ranks: Ranks) -> tuple[Run, dict[str, Any]]:
    """A denoising step on these ranks, and what the cost model must know of it."""
    spec, dtype = case.spec, DTYPES[case.dtype]
    torch.manual_seed(0)
    dit = WanDiT(spec).eval()
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(ranks.device, torch.float32 if dit.keep_in_fp32(name) else dtype)
    # Drawn first: choosing kernels moves the random numbers on the first rank alone.
    x = torch.randn(1, spec.in_channels, *case.cells("denoise")).to(ranks.device)
    texts = [torch.zeros(1, _TEXT_TOKENS, spec.text_dim) for _ in range(1 + case.guided)]
    for text, length in zip(texts, _PROMPT_LENGTHS, strict=False):
        text[:, :length] = torch.randn(1, length, spec.text_dim)
    ranks.divide_dit(dit)
    fast = make_fast_dit(dit, policy=policy_of("rounding", ()), ranks=ranks)
    planner = ranks.step_planner(fast.planner, insisted=False)
    choices, _ = planner.loop(tuple(x.shape), guided=case.guided)
    predict = ranks.make_predictor([text.to(ranks.device, dtype) for text in texts], choices)
    t = torch.tensor([500.0], device=ranks.device)
    tokens = sum(_PROMPT_LENGTHS) // 2 if choices.prompt_once and fast.choices.collapses_padding else _TEXT_TOKENS
    facts = {"branches": len(texts), "batched": choices.guidance_batched, "text_tokens": tokens}
    return lambda: predict(fast.dit, x, t), facts


def _decoding(case: ParallelCase, ranks: Ranks) -> tuple[Run, dict[str, Any]]:
    """The decoding of a video on these ranks, and what the cost model must know of it."""
    spec = case.vae_spec
    torch.manual_seed(0)
    vae = WanVAE(spec).eval().to(ranks.device, DTYPES[case.dtype])
    z = torch.randn(1, spec.z_dim, *case.cells("decode")).to(ranks.device)  # first, as in `_step`
    fast = make_fast(vae, policy=policy_of("rounding", ()), ranks=ranks)
    prepare(vae.decoder)
    passage = next(ranks.vae_planner(fast.planner, spec).decode(tuple(z.shape)))
    doubling = [module for module in vae.decoder.modules() if isinstance(module, Resample)]
    facts = {
        "steps": passage.steps,
        "folded": all(module.kernel is not None for module in doubling),
        "columns": passage.share.columns.num_parts if isinstance(passage, SharedPassage) else 1,
        "overlaps": isinstance(passage, SharedPassage) and passage.share.overlaps,
        "margin": isinstance(passage, SharedPassage) and passage.margin is not None,
    }

    def run() -> None:
        for _ in stages.decode(vae, z, iter([passage]), lambda _: None):
            pass

    return run, facts


# Afterwards.


def _table(case: ParallelCase, started: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each number of ranks: what was measured, and what the cost model says."""
    alone_s = statistics.median(_seconds(started[1]))
    (alone,) = _costs(case, started[1][0])
    return [_row(case, records, alone_s, alone.flops / alone_s) for records in started.values()]


def _row(
    case: ParallelCase, records: Sequence[Mapping[str, Any]], alone_s: float, flops_per_s: float
) -> dict[str, Any]:
    first, seconds = records[0], _seconds(records)
    count, median_s = first["ranks"], statistics.median(seconds)
    costs = _costs(case, first)
    links = [record["link"] for record in records if record["link"]]
    link = {name: statistics.median(each[name] for each in links) for name in links[0]} if links else None
    expected_s = predicted_s(
        costs, flops_per_s, Network(inside=Link(**(link or {"bytes_per_s": 1.0, "latency_s": 0.0})))
    )
    return {
        "ranks": count,
        "plan": first["plan"],
        "work": first["work"],
        "seconds": {"median": median_s, "low": min(seconds), "high": max(seconds), "all": seconds},
        "efficiency": alone_s / (count * median_s),
        "cpu_seconds": statistics.median(max(record["cpu_seconds"]) for record in records),
        "predicted": {"seconds": expected_s, "efficiency": alone_s / (count * expected_s)},
        "sent_bytes": first["sent_bytes"],
        "predicted_sent_bytes": [cost.sent_bytes for cost in costs],
        "peak_bytes": [max(peaks) for peaks in zip(*(record["peak_bytes"] for record in records), strict=True)],
        "link": link,
    }


def _seconds(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [value for record in records for value in record["seconds"]]


def _costs(case: ParallelCase, record: Mapping[str, Any]) -> list[RankCost]:
    plan, work, itemsize = ParallelPlan(**record["plan"]), dict(record["work"]), DTYPES[case.dtype].itemsize
    if "branches" in work:
        return step_costs(StepWork(spec=case.spec, latent_THW=case.cells("denoise"), itemsize=itemsize, **work), plan)
    margin = work.pop("margin")
    made = VaeWork(spec=case.vae_spec, latent_THW=case.cells("decode"), itemsize=itemsize, **work)
    return margin_costs(made, record["ranks"]) if margin else pass_costs(made, record["ranks"], parts=plan.vae)
