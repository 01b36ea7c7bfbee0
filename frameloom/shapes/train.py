"""Trains the built-in model from nothing: `python -m frameloom.shapes.train --runs runs --into checkpoint`.

Checkpoints itself every few minutes; the same command goes on where it stopped. The world is synthetic and seeded, so
nothing is downloaded.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from frameloom.errors import RequestError
from frameloom.platform.device import choose_device
from frameloom.shapes.export import WEIGHTS, export
from frameloom.shapes.train_dit import train_dit
from frameloom.shapes.train_vae import train_vae


def main() -> None:
    """Train the VAE, then the DiT with its text encoder, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training checkpoints")
    parser.add_argument("--into", type=Path, default=Path("checkpoint"), help="folder to write the model to")
    parser.add_argument("--dit-steps", type=int, default=12_000, help="optimiser steps of the DiT")
    parser.add_argument("--vae-from", type=Path, help="begin the VAE with the weights of this checkpoint's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    arguments = parser.parse_args()
    if arguments.dit_steps < 1:
        parser.error(f"--dit-steps {arguments.dit_steps}: at least one is needed")
    try:
        device, why = choose_device(arguments.device)
    except RequestError as error:
        parser.error(str(error))
    start = None
    if arguments.vae_from:
        weights = arguments.vae_from / "vae" / WEIGHTS
        if not weights.is_file():
            parser.error(f"there is no {weights}; --vae-from takes the folder of a checkpoint that train wrote")
        start = load_file(weights)
    print(f"training on {device}: {why}", flush=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    vae, vae_seconds = train_vae(arguments.runs, device, start=start)
    networks, clips, dit_seconds = train_dit(arguments.runs, vae, device, total_steps=arguments.dit_steps)
    export(arguments.into, vae, networks, clips)
    print(f"VAE {vae_seconds / 60:.0f} min, DiT {dit_seconds / 60:.0f} min; the model is in {arguments.into}")


if __name__ == "__main__":
    main()
