"""What plans say against what runs take: `python benchmarks/planner.py [PART OF A NAME]`; writes benchmarks/results/.

A grid of network, size, frames and arrangement, random weights, each case in a process of its own on one thread of a
CPU. Memory: the peak of the process above what it has after its imports. Seconds: of the CPU, which others on the
machine disturb less than those of a clock. As in use, a first run of every network teaches the rate of the others;
teachers are of another size and are not in the table. A case whose time is off by more than a fifth is run again, twice
at most, and its fastest run counts; the record keeps all.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from records import RESULTS, keep

from frameloom.bench.paired import machine
from frameloom.engine.blueprint import draw
from frameloom.engine.dit import make_fast_dit
from frameloom.engine.foresight import Foresight
from frameloom.engine.machine import LIBRARIES_BYTES, machine_of
from frameloom.engine.rates import Book, Rates, attention_flops, glance, text_flops
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import make_fast
from frameloom.models.encoders import build_text_encoder
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec
from frameloom.models.vae_fast import prepare
from frameloom.models.wan_dit import WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.parallel.pass_cost import VaeWork, pass_costs
from frameloom.parallel.step_cost import StepWork, step_costs
from frameloom.pipeline import stages
from frameloom.platform.allocator import keep_freed_memory
from frameloom.platform.device import DTYPES
from frameloom.platform.host import resident_bytes
from frameloom.platform.tuning import Tuner
from frameloom.types import ParallelPlan
from frameloom.weights.assemble import assemble
from frameloom.weights.published import without_files

STEPS = 2  # timed, after the first
PROMPTS = (30, 200)  # tokens of both prompts
OFF = 0.2
RECORD = "planner-cpu"
RUNS = 3
_DIT = {"attention_head_dim": 128, "text_dim": 256}
DITS: Mapping[str, Mapping[str, Any]] = {
    "512 wide": {**_DIT, "num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 6},
    "1024 wide": {**_DIT, "num_attention_heads": 8, "ffn_dim": 4096, "num_layers": 4},
    "1536 wide (1.3B)": {**_DIT, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 3},
}
VAES: Mapping[str, Mapping[str, Any]] = {
    "2.1, a third as wide": {"base_dim": 32},
    "2.1": {"base_dim": 96},
    "2.2, a third as wide": {
        "base_dim": 56, "decoder_base_dim": 88, "z_dim": 16, "is_residual": True, "in_channels": 12,
        "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    },
}  # fmt: skip
TEXT = {
    "model_type": "umt5", "vocab_size": 60_000, "d_model": 256, "d_kv": 64, "d_ff": 4096, "num_layers": 8,
    "num_heads": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_STATISTICS = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}
Case = dict[str, Any]


def _denoise(dit: str, dtype: str, size: tuple[int, int, int], *, batched: bool = False) -> Case:
    return {"stage": "denoise", "network": dit, "dtype": dtype, "size": size, "batched": batched}


def _vae(
    stage: str, vae: str, size: tuple[int, int, int], steps: int, rows: int | None, dtype: str = "float32"
) -> Case:
    return {"stage": stage, "network": vae, "dtype": dtype, "size": size, "steps": steps, "rows": rows}


TEACHERS = [
    *(_denoise(dit, dtype, (128, 192, 13)) for dit in DITS for dtype in ("float32", "bfloat16")),
    *(_vae("decode", vae, (96, 128, 9), 2, None) for vae in VAES),
    *(_vae("encode", f"{version}, a third as wide", (96, 128, 9), 2, None) for version in ("2.1", "2.2")),
    {"stage": "text", "network": "UMT5", "dtype": "float32", "prompts": 1, "config": TEXT},
]
GRID = [
    # Sizes are HEIGHT, WIDTH, FRAMES.
    *(
        _denoise(dit, dtype, size)
        for dit in DITS
        for dtype in ("float32", "bfloat16")
        for size in ((128, 128, 17), (192, 256, 17))
    ),
    _denoise("512 wide", "float32", (256, 320, 25)),
    _denoise("1024 wide", "bfloat16", (256, 384, 17)),
    *(_denoise(dit, "float32", (128, 192, 17), batched=True) for dit in DITS),
    _denoise("1024 wide", "bfloat16", (192, 256, 17), batched=True),
    *(
        _vae("decode", "2.1, a third as wide", size, steps, rows)
        for size in ((128, 192, 17), (192, 256, 17))
        for steps, rows in ((1, None), (2, None), (2, 32))
    ),
    *(_vae("decode", "2.1", (64, 128, 9), steps, rows) for steps, rows in ((1, None), (2, None), (2, 16))),
    _vae("decode", "2.1", (128, 128, 9), 2, 32),
    *(_vae("decode", "2.2, a third as wide", (128, 192, 17), steps, rows) for steps, rows in ((2, None), (1, 32))),
    *(_vae("encode", "2.1, a third as wide", size, 2, None) for size in ((128, 192, 17), (192, 256, 17))),
    _vae("encode", "2.2, a third as wide", (128, 192, 17), 2, None),
    {"stage": "text", "network": "UMT5", "dtype": "float32", "prompts": 2, "config": TEXT},
]


def main(wanted: str) -> None:
    """Run the teachers, then the cases of the grid whose names hold `wanted`; keep each row, print what all say."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for case in TEACHERS:
        if wanted in _name(case) or wanted in ("", case["stage"]):
            print(
                f"learning: {_name(case)}: {_run({**case, 'learns': True}, environment)['seconds']:.2f} s", flush=True
            )
    for case in GRID:
        if wanted in _name(case):
            keep({_name(case): _row(case, environment)}, RECORD)
    newest = max(RESULTS.glob(f"{RECORD}-*.json"))
    print(json.dumps(summary(json.loads(newest.read_text("utf-8"))), indent=1))


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """How near all cases of a record were."""
    memory, seconds = ([row[what]["ratio"] for row in record.values()] for what in ("memory", "seconds"))
    return {
        "cases": len(record),
        "memory, predicted to measured": [round(min(memory), 3), round(max(memory), 3)],
        "memory within a tenth, and no more than 5 % under": sum(0.95 <= ratio <= 1.1 for ratio in memory),
        "seconds, predicted to measured": [round(min(seconds), 3), round(max(seconds), 3)],
        "seconds within a quarter": sum(0.75 <= ratio <= 1.25 for ratio in seconds),
    }


def _name(case: Case) -> str:
    size = "x".join(map(str, case.get("size", (case.get("prompts"),))))
    way = "batched" if case.get("batched") else ""
    if "steps" in case:
        way = f"{case['steps']} at a time, " + (f"bands of {case['rows']}" if case["rows"] else "whole pictures")
    return ", ".join(filter(None, (case["stage"], case["network"], case["dtype"], size, way)))


def _row(case: Case, environment: Mapping[str, str]) -> dict[str, Any]:
    runs = [_run(case, environment)]
    while len(runs) < RUNS and abs(runs[-1]["predicted_s"] / min(run["seconds"] for run in runs) - 1) > OFF:
        runs.append(_run(case, environment))
    fastest = min(runs, key=lambda run: run["seconds"])
    peak = max(run["peak_bytes"] for run in runs)
    row = {
        "case": _name(case),
        "memory": {
            "predicted_bytes": fastest["predicted_bytes"],
            "measured_bytes": peak,
            "ratio": fastest["predicted_bytes"] / peak,
        },
        "seconds": {
            "predicted": fastest["predicted_s"],
            "measured": fastest["seconds"],
            "ratio": fastest["predicted_s"] / fastest["seconds"],
        },
        "runs": runs,
        "machine": machine(torch.device("cpu")),
    }
    print(f"{row['case']}: memory {row['memory']['ratio']:.2f}, seconds {row['seconds']['ratio']:.2f}", flush=True)
    return row


def _run(case: Case, environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
    if done.returncode:
        sys.exit(f"{_name(case)} failed: {done.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# In a process of its own.


@torch.inference_mode()
def _child(case: Case) -> dict[str, Any]:
    keep_freed_memory()
    torch.manual_seed(0)
    base = resident_bytes()
    run = {"denoise": _denoising, "text": _reading}.get(case["stage"], _passing)(case)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    held = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak is counted from here on
    seconds = run()
    peak = _peak_bytes()
    predicted = _foreseen(case, seconds)
    return {"peak_bytes": peak - base, "held_bytes": held - base, "seconds": seconds, **predicted}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _cpu_s(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def _latent_shape(case: Case, spec: VaeSpec) -> tuple[int, ...]:
    height, width, frames = case["size"]
    space, speed = spec.spatial_scale, spec.temporal_scale
    return 1, spec.z_dim, 1 + (frames - 1) // speed, height // space, width // space


def _denoising(case: Case) -> Callable[[], float]:
    spec, dtype = TransformerSpec(**DITS[case["network"]]), DTYPES[case["dtype"]]
    dit = WanDiT(spec).eval()
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else dtype)
    fast = make_fast_dit(dit, policy=policy_of("rounding", ()))
    x = torch.randn(_latent_shape(case, VaeSpec()))
    texts = [torch.zeros(1, 512, spec.text_dim, dtype=dtype) for _ in PROMPTS]
    for text, length in zip(texts, PROMPTS, strict=True):
        text[:, :length] = torch.randn(1, length, spec.text_dim).to(dtype)
    predict = stages.Predictor(texts, replace(fast.choices.loop, guidance_batched=case["batched"]))

    def run() -> float:
        seconds = [_cpu_s(lambda: predict(fast.dit, x, torch.tensor([500.0]))) for _ in range(1 + STEPS)]
        return sum(seconds[1:]) / STEPS

    return run


def _passing(case: Case) -> Callable[[], float]:
    spec = VaeSpec(**{**_STATISTICS, **VAES[case["network"]]})
    fast = make_fast(WanVAE(spec).eval().to(DTYPES[case["dtype"]]), policy=policy_of("rounding", ()))
    passage = replace(fast.planner.choices.passage, steps=case["steps"], rows=case["rows"])
    height, width, frames = case["size"]
    prepare(fast.vae.decoder)
    if case["stage"] == "encode":
        prepare(fast.vae.encoder)
        levels = torch.randint(0, 255, (frames, height, width, 3), dtype=torch.uint8)
        return lambda: _cpu_s(lambda: stages.encode(fast.vae, levels, iter([passage])))
    z = torch.randn(_latent_shape(case, spec))
    return lambda: _cpu_s(lambda: [None for _ in stages.decode(fast.vae, z, iter([passage]), lambda _: None)])


def _reading(case: Case) -> Callable[[], float]:
    encoder = Umt5Encoder(Umt5Spec.from_config(case["config"], where="here")).eval()
    ids = torch.randint(0, 1000, (case["prompts"], 512))
    return lambda: _cpu_s(lambda: encoder(ids, torch.ones_like(ids)))


def _foreseen(case: Case, seconds: float) -> dict[str, float]:
    """Bytes and seconds by the planner, and what this run teaches it, if it is to."""
    foresight, book = _planner(case)
    plan, stage = foresight.plan, case["stage"]
    channels = plan.vae.decoder_base_dim or plan.vae.base_dim
    rates = book.corrected(glance(foresight.machine.device, plan.dtype, channels))
    weights = {part.name: part.size_bytes for part in foresight.weights(encodes=stage == "encode", with_image=False)}
    count = {"denoise": _of_step, "text": _of_text}.get(stage, _of_passage)
    part, working, predicted_s, rate = count(case, foresight, rates, seconds)
    if case.get("learns"):
        key, _ = book.lessons(rates)["image" if stage == "encode" else stage]
        book.tuner.note(key, rate)
        book.tuner.save()
    return {
        "predicted_bytes": weights[part] + working + LIBRARIES_BYTES,
        "predicted_s": predicted_s,
        "flops_per_s": rate,
        "weight_bytes": weights[part],
        "working_bytes": working,
    }


def _planner(case: Case) -> tuple[Foresight, Book]:
    """A planner for a checkpoint whose network of this stage is the case's, and what runs have taught."""
    stage, text = case["stage"], case.get("config", TEXT)
    dit = dict(DITS[case["network"] if stage == "denoise" else "512 wide"])
    vae = {} if stage in ("denoise", "text") else dict(VAES[case["network"]])
    with on_meta():
        networks = {
            "transformer": WanDiT(TransformerSpec(**dit)),
            "vae": WanVAE(VaeSpec(**{**_STATISTICS, **vae})),
            "text_encoder": build_text_encoder(text),
            "tokenizer": torch.nn.Module(),
        }
    configs = {"transformer": dit, "vae": {**_STATISTICS, **vae}, "text_encoder": text, "tokenizer": {}}
    parts = {name: without_files(name, configs[name], network) for name, network in networks.items()}
    plan = draw(assemble(parts, facts={}, name="random", path=Path()), torch.device("cpu"), dtype=case["dtype"])
    here = machine_of("cpu")
    book = Book(
        tuner=Tuner(here.device), dit=plan.experts[0], dtype=plan.dtype, vae=plan.vae, vae_dtype=plan.vae_dtype,
        text=text,
    )  # fmt: skip
    return Foresight(plan=plan, machine=here, policy=policy_of("rounding", ())), book


Counted = tuple[str, int, float, float]  # the component, its working bytes, predicted seconds, the rate of this run


def _of_step(case: Case, foresight: Foresight, rates: Rates, seconds: float) -> Counted:
    shape = _latent_shape(case, VaeSpec())
    working = foresight.step_bytes(shape, branches=2, batched=case["batched"])
    work = StepWork(
        spec=foresight.plan.experts[0], latent_THW=shape[2:], batched=case["batched"],
        text_tokens=foresight.text_tokens, itemsize=foresight.plan.dtype.itemsize,
    )  # fmt: skip
    flops, attention = step_costs(work, ParallelPlan())[0].flops, attention_flops(work)
    rate = (flops - attention + attention * rates.products / rates.attention) / seconds
    return "transformer", working, rates.step_s(flops, attention), rate


def _of_text(case: Case, foresight: Foresight, rates: Rates, seconds: float) -> Counted:
    flops = text_flops(case["config"], case["prompts"], 512)
    return "text_encoder", foresight.text_bytes(case["prompts"]), flops / rates.text, flops / seconds


def _of_passage(case: Case, foresight: Foresight, rates: Rates, seconds: float) -> Counted:
    spec, encodes = foresight.plan.vae, case["stage"] == "encode"
    passage = replace(foresight.vae_planner.choices.passage, steps=case["steps"], rows=case["rows"])
    height, width, frames = case["size"]
    cells = _latent_shape(case, spec)
    working = foresight.vae_bytes((1, 3, frames, height, width) if encodes else cells, passage, encode=encodes)
    flops = pass_costs(VaeWork(spec=spec, latent_THW=cells[2:], steps=case["steps"], encodes=encodes), 1)[0].flops
    return "vae", working, flops / (rates.encode if encodes else rates.decode), flops / seconds


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else ""
    if argument.startswith("{"):
        print(json.dumps(_child(json.loads(argument))))
    else:
        main(argument)
