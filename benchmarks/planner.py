"""What plans say against what runs take: `python benchmarks/planner.py [PART OF A NAME]`; writes benchmarks/results/.

A grid of network, size, frames and arrangement, random weights; each run in a process of its own on a thread of a CPU,
three runs a case, of which the medians count; the record keeps all. Memory: the peak of the process above what it has
after its imports. Seconds: of the CPU, which others on the machine disturb less than those of a clock. As in use, runs
of every network teach the rates of the others: a small and a larger one, of sizes that are not in the grid.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_weights import write_transformer
from records import RESULTS, keep

from frameloom.bench.paired import machine
from frameloom.engine.blueprint import draw
from frameloom.engine.dit import load_plain_dit, make_fast_dit
from frameloom.engine.foresight import Foresight
from frameloom.engine.machine import LIBRARIES_BYTES, machine_of
from frameloom.engine.rates import Book, attention_flops, glance, text_flops
from frameloom.engine.residence import Residents
from frameloom.engine.rewrites import policy_of
from frameloom.engine.vae import make_fast
from frameloom.memory.layout import Layout, held_in
from frameloom.memory.stream import Stream
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
from frameloom.types import ParallelPlan, Residence
from frameloom.weights.assemble import assemble
from frameloom.weights.published import without_files
from frameloom.weights.source import open_parts

STEPS = 2  # timed, after the first
PROMPTS = (30, 200)  # tokens of both prompts
RECORD = "planner-cpu"
RUNS = 3
FILE = "wan2.1_t2v.safetensors"
LAYOUTS = {False: Layout(), True: Layout(transformer=Residence.STREAMED)}
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


def _denoise(
    dit: str, dtype: str, size: tuple[int, int, int], *, batched: bool = False, streamed: bool = False
) -> Case:
    return {
        "stage": "denoise", "network": dit, "dtype": dtype, "size": size, "batched": batched, "streamed": streamed,
    }  # fmt: skip


def _vae(
    stage: str, vae: str, size: tuple[int, int, int], steps: int, rows: int | None, dtype: str = "float32"
) -> Case:
    return {"stage": stage, "network": vae, "dtype": dtype, "size": size, "steps": steps, "rows": rows}


def _text(prompts: int) -> Case:
    return {"stage": "text", "network": "UMT5", "dtype": "float32", "prompts": prompts, "config": TEXT}


# Sizes are HEIGHT, WIDTH, FRAMES.
TEACHERS = [
    *(
        _denoise(dit, dtype, size)
        for dit in DITS
        for dtype in ("float32", "bfloat16")
        for size in ((128, 128, 9), (224, 288, 17))
    ),
    *(_vae("decode", vae, (96, 128, 9), 2, None) for vae in VAES),
    *(_vae("decode", vae, (160, 192, 17), 2, None) for vae in VAES if vae != "2.1"),
    *(
        _vae("encode", f"{version}, a third as wide", size, 2, None)
        for version in ("2.1", "2.2")
        for size in ((96, 128, 9), (160, 192, 17))
    ),
    _text(1),
]
GRID = [
    *(
        _denoise(dit, dtype, size)
        for dit in DITS
        for dtype in ("float32", "bfloat16")
        for size in ((144, 176, 13), (176, 272, 17))
    ),
    _denoise("512 wide", "float32", (256, 288, 21)),
    _denoise("1024 wide", "bfloat16", (224, 368, 17)),
    *(_denoise(dit, "float32", (160, 160, 17), batched=True) for dit in DITS),
    _denoise("1024 wide", "bfloat16", (192, 224, 17), batched=True),
    *(_denoise(dit, "bfloat16", (144, 240, 17), streamed=True) for dit in DITS),
    *(
        _vae("decode", "2.1, a third as wide", size, steps, rows)
        for size in ((112, 176, 13), (192, 208, 17))
        for steps, rows in ((1, None), (2, None), (2, 32))
    ),
    *(_vae("decode", "2.1", (72, 128, 9), steps, rows) for steps, rows in ((1, None), (2, None), (2, 16))),
    _vae("decode", "2.1", (104, 144, 9), 2, 32),
    *(_vae("decode", "2.2, a third as wide", (144, 176, 17), steps, rows) for steps, rows in ((2, None), (1, 32))),
    *(_vae("encode", "2.1, a third as wide", size, 2, None) for size in ((112, 176, 13), (192, 208, 17))),
    _vae("encode", "2.2, a third as wide", (144, 176, 17), 2, None),
    _text(2),
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
    way = "batched" if case.get("batched") else "streamed" if case.get("streamed") else ""
    if "steps" in case:
        way = f"{case['steps']} at a time, " + (f"bands of {case['rows']}" if case["rows"] else "whole pictures")
    return ", ".join(filter(None, (case["stage"], case["network"], case["dtype"], size, way)))


def _row(case: Case, environment: Mapping[str, str]) -> dict[str, Any]:
    runs = [_run(case, environment) for _ in range(RUNS)]
    row: dict[str, Any] = {"case": _name(case)}
    for what, predicted, measured in (
        ("memory", "predicted_bytes", "peak_bytes"),
        ("seconds", "predicted_s", "seconds"),
    ):
        found = statistics.median(run[measured] for run in runs)
        foreseen = runs[0][predicted]
        row[what] = {"predicted": foreseen, "measured": found, "ratio": foreseen / found}
    print(f"{row['case']}: memory {row['memory']['ratio']:.2f}, seconds {row['seconds']['ratio']:.2f}", flush=True)
    return {**row, "runs": runs, "machine": machine(torch.device("cpu"))}


def _run(case: Case, environment: Mapping[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if case.get("streamed"):
            write_transformer(Path(folder) / FILE, TransformerSpec(**DITS[case["network"]]), repeats=True)
        command = [sys.executable, __file__, json.dumps({**case, "folder": folder})]
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
    fast = make_fast_dit(_streamed(case) if case["streamed"] else _resident(case), policy=policy_of("rounding", ()))
    x = torch.randn(_latent_shape(case, VaeSpec()))
    spec, dtype = fast.dit.spec, DTYPES[case["dtype"]]
    texts = [torch.zeros(1, 512, spec.text_dim, dtype=dtype) for _ in PROMPTS]
    for text, length in zip(texts, PROMPTS, strict=True):
        text[:, :length] = torch.randn(1, length, spec.text_dim).to(dtype)
    predict = stages.Predictor(texts, replace(fast.choices.loop, guidance_batched=case["batched"]))

    def run() -> float:
        seconds = [_cpu_s(lambda: predict(fast.dit, x, torch.tensor([500.0]))) for _ in range(1 + STEPS)]
        return sum(seconds[1:]) / STEPS

    return run


def _resident(case: Case) -> WanDiT:
    dit = WanDiT(TransformerSpec(**DITS[case["network"]])).eval()
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else DTYPES[case["dtype"]])
    return dit


def _streamed(case: Case) -> WanDiT:
    """With its weights in a file."""
    spec, device = TransformerSpec(**DITS[case["network"]]), torch.device("cpu")
    residents = Residents(layout=LAYOUTS[True], device=device, transformer=Stream(device))
    part = open_parts(Path(case["folder"]) / FILE)["transformer"]
    return load_plain_dit(part, spec, DTYPES[case["dtype"]], device, residents=residents)


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
    lesson = "image" if stage == "encode" else stage
    channels = plan.vae.decoder_base_dim or plan.vae.base_dim
    component = {"denoise": "transformer", "text": "text_encoder"}.get(stage, "vae")
    parts = foresight.weights(encodes=stage == "encode", with_image=False)
    weights = held_in(
        "decode" if stage == "encode" else stage,
        [part for part in parts if part.name == component],
        LAYOUTS[bool(case.get("streamed"))],
    )
    counted = {"denoise": _of_step, "text": _of_text}.get(stage, _of_passage)(case, foresight)
    rates = book.corrected(
        glance(foresight.machine.device, plan.dtype, channels, tuner=book.tuner), {lesson: counted.flops}
    )
    rate = {"denoise": rates.products, "text": rates.text, "decode": rates.decode, "encode": rates.encode}[stage]
    taken = counted.flops + counted.attention_flops * (rates.products / rates.attention - 1)  # as if all were products
    if case.get("learns"):
        key, _ = book.lessons(rates, {lesson: counted.flops})[lesson]
        book.tuner.note(key, taken / seconds)
        book.tuner.save()
    return {
        "predicted_bytes": weights + counted.working_bytes + LIBRARIES_BYTES,
        "predicted_s": taken / rate,
        "flops_per_s": taken / seconds,
        "weight_bytes": weights,
        "working_bytes": counted.working_bytes,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """What a case takes besides its weights, and what it computes."""

    working_bytes: int
    flops: float
    attention_flops: float = 0.0


def _of_step(case: Case, foresight: Foresight) -> Counted:
    shape, layout = _latent_shape(case, VaeSpec()), LAYOUTS[case["streamed"]]
    work = StepWork(
        spec=foresight.plan.experts[0], latent_THW=shape[2:], batched=case["batched"],
        text_tokens=foresight.text_tokens, itemsize=foresight.plan.dtype.itemsize,
    )  # fmt: skip
    return Counted(
        working_bytes=foresight.step_bytes(shape, branches=2, batched=case["batched"], residence=layout.transformer),
        flops=step_costs(work, ParallelPlan())[0].flops,
        attention_flops=attention_flops(work),
    )


def _of_text(case: Case, foresight: Foresight) -> Counted:
    flops = text_flops(case["config"], case["prompts"], 512)
    return Counted(working_bytes=foresight.text_bytes(case["prompts"]), flops=flops)


def _of_passage(case: Case, foresight: Foresight) -> Counted:
    spec, encodes = foresight.plan.vae, case["stage"] == "encode"
    passage = replace(foresight.vae_planner.choices.passage, steps=case["steps"], rows=case["rows"])
    height, width, frames = case["size"]
    cells = _latent_shape(case, spec)
    return Counted(
        working_bytes=foresight.vae_bytes((1, 3, frames, height, width) if encodes else cells, passage, encode=encodes),
        flops=pass_costs(VaeWork(spec=spec, latent_THW=cells[2:], encodes=encodes), 1)[0].flops,
    )


if __name__ == "__main__":
    argument = sys.argv[1] if len(sys.argv) > 1 else ""
    if argument.startswith("{"):
        print(json.dumps(_child(json.loads(argument))))
    else:
        main(argument)
