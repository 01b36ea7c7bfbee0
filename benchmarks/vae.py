"""The VAE against Diffusers on this machine: `python benchmarks/vae.py cpu` or `cuda`; writes benchmarks/results/.

Every case runs in a process of its own (the allocator's setting cannot be taken back), both sides in turns.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
NO_COMPILER = "--rewrite vae.conv_winograd=off --rewrite vae.norm_silu_native=off"
DIRECT = f"{NO_COMPILER} --rewrite vae.conv_winograd_plain=off"

CPU = {
    "decode 2.1 tuned": "--size 240x320x17",
    "decode 2.1 default allocator": "--size 240x320x17 --allocator default",
    "decode 2.1 against channels-last": "--size 240x320x17 --baseline channels_last",
    "decode 2.1 without a compiler, tuned": f"--size 240x320x17 {NO_COMPILER}",
    "decode 2.1 without a compiler, default allocator": f"--size 240x320x17 --allocator default {NO_COMPILER}",
    "decode 2.1 direct, tuned": f"--size 240x320x17 {DIRECT}",
    "decode 2.1 bfloat16": "--size 240x320x17 --dtype bfloat16",
    "decode 2.2 tuned": "--vae 2.2 --size 256x320x9",
    "encode 2.1 tuned": "--direction encode --size 240x320x17",
    "encode 2.2 tuned": "--vae 2.2 --direction encode --size 256x320x17",
    "decode 2.1 direct, memory": f"--size 480x832x17 --rounds 1 {DIRECT}",
}
CUDA = {
    f"{direction} {vae} {size} against {baseline}": (
        f"--vae {vae} --direction {direction} --size {size} --dtype bfloat16 --baseline {baseline}"
    )
    for vae, size in (("2.1", "480x832x81"), ("2.1", "720x1280x81"), ("2.2", "704x1280x81"))
    for direction in ("decode", "encode")
    for baseline in ("shipped", "channels_last")
}


def main() -> None:
    """Run the cases of one device, or those whose name holds the second argument, and write one record each."""
    device = sys.argv[1]
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    records = {}
    for name, options in (CUDA if device == "cuda" else CPU).items():
        if wanted not in name:
            continue
        command = [sys.executable, "-m", "frameloom", "bench", "vae", "--device", device, "--json", *options.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip()[-300:]}", flush=True)
            continue
        record = json.loads(done.stdout)
        records[name] = record
        speedup, peak = record["speedup"], record["peak_bytes"]
        print(
            f"{name}: {speedup['median']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f}), memory "
            f"{peak['ours'] / peak['diffusers']:.2f}x, relative error {record['relative_error']:.1e}",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"vae-{device}-{time.strftime('%Y-%m-%d')}.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
