"""The VAE against Diffusers on this machine: `python benchmarks/vae.py cpu` or `cuda`; writes benchmarks/results/.

Every case runs in a process of its own (the allocator's setting cannot be taken back), both sides in turns.
"""

import sys

from records import run_cases

NO_COMPILER = "--rewrite vae.conv_winograd=off --rewrite vae.upsample_winograd=off --rewrite vae.norm_silu_native=off"
BRIEF = "--rounds 2 --no-peaks"

_LAST = "--baseline channels_last"
CPU = {
    "decode 2.1, default allocator": f"--size 240x320x17 --allocator default {BRIEF}",
    "decode 2.1, tuned allocator": f"--size 240x320x17 {BRIEF}",
    "decode 2.1 without a compiler, default allocator": f"--size 240x320x17 --allocator default {NO_COMPILER} {BRIEF}",
    "decode 2.1 without a compiler, tuned allocator": f"--size 240x320x17 {NO_COMPILER} {BRIEF}",
    "decode 2.1 against channels-last, default allocator": f"--size 240x320x17 --allocator default {_LAST} {BRIEF}",
    "decode 2.1 against channels-last, tuned allocator": f"--size 240x320x17 {_LAST} {BRIEF}",
    "decode 2.1 against channels-last without a compiler, default allocator": (
        f"--size 240x320x17 --allocator default {_LAST} {NO_COMPILER} {BRIEF}"
    ),
    "decode 2.1 against channels-last without a compiler, tuned allocator": (
        f"--size 240x320x17 {_LAST} {NO_COMPILER} {BRIEF}"
    ),
    "decode 2.1, 320x480, tuned allocator": f"--size 320x480x17 {BRIEF}",
    "decode 2.1 in bfloat16, tuned allocator": f"--size 240x320x17 --dtype bfloat16 {BRIEF}",
    "decode 2.2, tuned allocator": f"--vae 2.2 --size 256x320x9 {BRIEF}",
    "encode 2.1, tuned allocator": f"--direction encode --size 240x320x17 {BRIEF}",
    "encode 2.2, tuned allocator": f"--vae 2.2 --direction encode --size 256x320x17 {BRIEF}",
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
    """Run the cases of one device, or those whose name holds the second argument."""
    device, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    run_cases("vae", CUDA if device == "cuda" else CPU, device=device, wanted=wanted)


if __name__ == "__main__":
    main()
