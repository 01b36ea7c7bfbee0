"""From a cold start to a finished MP4: `frameloom generate` against diffusers.WanPipeline, in processes in turns.

`python benchmarks/cold_start.py [ROUNDS]`; the built-in model, the same prompt, steps and size; writes
benchmarks/results/. The first round, in which Frameloom may build and measure its kernels, is told apart.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from records import keep

from frameloom.bench.paired import machine
from frameloom.shapes import PATH

PROMPT = "a red circle moving left"
THEIRS = """
import sys
import av
import torch
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
(frames,) = pipe(
    sys.argv[3], negative_prompt="", width=64, height=64, num_frames=17, num_inference_steps=25, guidance_scale=3.0,
    generator=torch.Generator("cpu").manual_seed(0),
).frames
with av.open(sys.argv[2], "w") as file:
    stream = file.add_stream("libx264", rate=8, options={"crf": "18"})
    stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
    for frame in (frames * 255).round().astype("uint8"):
        file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    file.mux(stream.encode())
"""


def main() -> None:
    """Time both, print and write one record."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "theirs.py"
        script.write_text(THEIRS, encoding="utf-8")
        video = str(Path(folder) / "video.mp4")
        commands = {
            "ours": [sys.executable, "-m", "frameloom", "generate", PROMPT, "-o", video, "--no-journal", "--quiet"],
            "diffusers": [sys.executable, str(script), str(PATH), video, PROMPT],
        }
        for round_ in range(rounds + 1):
            for side in sorted(commands, reverse=round_ % 2 == 1):
                begun = time.perf_counter()
                subprocess.run(commands[side], check=True, capture_output=True)
                seconds[side].append(time.perf_counter() - begun)
    ratios = [theirs / ours for theirs, ours in zip(seconds["diffusers"][1:], seconds["ours"][1:], strict=True)]
    record = {
        "speedup": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        "seconds": {side: statistics.median(values[1:]) for side, values in seconds.items()},
        "first_seconds": {side: values[0] for side, values in seconds.items()},
        "machine": machine(torch.device("cpu")),
    }
    print(json.dumps(record, indent=1))
    keep(record, "cold-start")


if __name__ == "__main__":
    main()
