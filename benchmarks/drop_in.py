"""Pipelines of Diffusers accelerated and as they come, on this machine: `python benchmarks/drop_in.py cpu` or `cuda`.

Every case runs in a process of its own (the allocator's setting cannot be taken back), both sides in turns; writes
benchmarks/results/.
"""

import sys

from records import run_cases

CPU = {
    "Wan 2.1": "--size 128x192x9 --steps 1",
    "Wan 2.1, default allocator": "--size 128x192x9 --steps 1 --allocator default --no-peaks",
    "Wan 2.2 TI2V": "--pipeline 'WanPipeline (2.2 TI2V)' --size 64x96x9 --steps 1",
    "image to video": "--pipeline 'WanImageToVideoPipeline (2.1)' --size 128x160x9 --steps 1",
    "Qwen-Image": "--pipeline QwenImagePipeline --size 256x256x1 --steps 1",
    "Cosmos 3, image to video": "--pipeline 'Cosmos3OmniPipeline (image)' --size 96x128x17 --steps 1",
    "built-in model": "--model frameloom/shapes/checkpoint --size 64x64x17 --steps 8",
    "all, small": "--pipeline all --widths small --size 64x96x9",
}
CUDA = {
    "Wan 2.1": "--size 480x832x81 --steps 2",
    "Wan 2.2 TI2V": "--pipeline 'WanPipeline (2.2 TI2V)' --size 704x1280x81 --steps 2",
    "image to video": "--pipeline 'WanImageToVideoPipeline (2.1)' --size 480x832x81 --steps 2",
    "Qwen-Image": "--pipeline QwenImagePipeline --size 1024x1024x1 --steps 2",
    "Cosmos 3, image to video": "--pipeline 'Cosmos3OmniPipeline (image)' --size 480x832x81 --steps 2",
    "all, small": "--pipeline all --widths small --size 64x96x9",
}


def main() -> None:
    """Run the cases of one device, or those whose name holds the second argument."""
    device, wanted = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    run_cases("drop-in", CUDA if device == "cuda" else CPU, device=device, wanted=wanted)


if __name__ == "__main__":
    main()
