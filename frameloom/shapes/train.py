"""Trains the built-in model from nothing: `python -m frameloom.shapes.train --runs runs --into checkpoint`.

Checkpoints itself every few minutes; the same command goes on where it stopped. The world is synthetic and seeded, so
nothing is downloaded.
"""

import argparse
from pathlib import Path

from frameloom.errors import RequestError
from frameloom.platform.device import choose_device
from frameloom.shapes.export import WEIGHTS, export, read_back
from frameloom.shapes.train_dit import train_dit
from frameloom.shapes.train_vae import train_vae


def main() -> None:
    """Train the VAE, then the DiT with its text encoder, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the training checkpoints")
    parser.add_argument("--into", type=Path, default=Path("checkpoint"), help="folder to write the model to")
    parser.add_argument("--dit-steps", type=int, default=12_000, help="optimiser steps of the DiT")
    parser.add_argument("--vae-from", type=Path, help="begin the VAE with the weights of this checkpoint's")
    parser.add_argument("--dit-from", type=Path, help="keep this checkpoint's VAE, and begin the DiT with its weights")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps")
    arguments = parser.parse_args()
    if arguments.dit_steps < 1:
        parser.error(f"--dit-steps {arguments.dit_steps}: at least one is needed")
    try:
        device, why = choose_device(arguments.device)
    except RequestError as error:
        parser.error(str(error))
    for folder in (arguments.vae_from, arguments.dit_from):
        if folder and not (folder / "vae" / WEIGHTS).is_file():
            parser.error(f"{folder} holds no vae/{WEIGHTS}; give the folder of a checkpoint that train wrote")
    print(f"training on {device}: {why}", flush=True)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if arguments.dit_from:
        (vae, start), vae_seconds = read_back(arguments.dit_from), 0.0
        vae.to(device)
    else:
        vae_start = read_back(arguments.vae_from)[0].state_dict() if arguments.vae_from else None
        (vae, vae_seconds), start = train_vae(arguments.runs, device, start=vae_start), None
    networks, clips, dit_seconds = train_dit(arguments.runs, vae, device, total_steps=arguments.dit_steps, start=start)
    export(arguments.into, vae, networks, clips)
    print(f"VAE {vae_seconds / 60:.0f} min, DiT {dit_seconds / 60:.0f} min; the model is in {arguments.into}")


if __name__ == "__main__":
    main()
