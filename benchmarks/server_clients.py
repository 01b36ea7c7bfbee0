"""The official `openai` clients, unmodified, through the whole scenario against a real server.

`python benchmarks/server_clients.py [--cache FOLDER] [--record]`: three versions of the Python package, each in an
environment of its own, and one of the npm package, where node is there. What they do: clients/scenario.py and .mjs.
Exit code 1 if a step went wrong. The built-in model, and a small random one that starts from an image.
"""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from records import keep
from served import Served, served

from frameloom.bench.paired import machine

HERE = Path(__file__).parent / "clients"
PYTHON = ("2.2.0", "2.54.0", "3.52.0")
NODE = "7.55.0"
KEYS = """\
[alice]
secret = "sk-alice-0123456789abcdef"
[tight]
secret = "sk-tight-0123456789abcdef"
queued = 1
"""
SAVE = "import sys; sys.path[:0] = ['tests']; from pathlib import Path; import checkpoints; \
checkpoints.save_checkpoint(Path(sys.argv[1]), 'image')"


def python_client(version: str, cache: Path) -> list[str]:
    """The words that run a script where this version, and nothing else, is installed."""
    folder = cache / version
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"openai=={version}"], check=True)
    return [str(python), "-W", "ignore::DeprecationWarning", str(HERE / "scenario.py")]


def node_client(cache: Path) -> list[str] | None:
    """The words that run the scenario of the npm package; None without node."""
    if not shutil.which("npm"):
        return None
    folder = cache / "node"
    if not (folder / "node_modules/openai").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"name": "scenario", "private": true}')
        subprocess.run(["npm", "install", "--silent", f"openai@{NODE}"], cwd=folder, check=True)
    shutil.copy(HERE / "scenario.mjs", folder)
    return ["node", str(folder / "scenario.mjs")]


@contextlib.contextmanager
def servers(folder: Path, cache: str = "") -> Iterator[tuple[Served, Served, Path]]:
    """One of text and edits, one that starts from an image, both ready; and a picture.

    `cache`: FRAMELOOM_CACHE of both, maybe a filled one; by default one in the folder.
    """
    keys, picture, model = folder / "keys.toml", folder / "start.png", folder / "model"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(file, "PNG")
    picture.write_bytes(file.getvalue())
    subprocess.run([sys.executable, "-c", SAVE, model], cwd=HERE.parents[1], check=True)
    environment = {"OMP_NUM_THREADS": "1", "FRAMELOOM_CACHE": cache or f"{folder}/cache"}
    options = ("--keys", str(keys), "--device", "cpu")
    with (
        served(folder / "text", *options, environment=environment) as text,
        served(folder / "image", *options, "--model", str(model), environment=environment) as image,
    ):
        for server in (text, image):
            server.wait_for("/health/ready", 180)
        yield text, image, picture


def run(words: list[str], text: Served, image: Served, picture: Path, steps: list[str]) -> dict[str, str]:
    """What a client says of every step."""
    urls = [f"http://127.0.0.1:{server.port}/v1" for server in (text, image)]
    done = subprocess.run([*words, *urls, str(picture), *steps], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"client": " ".join(words), "all": f"WRONG {done.stderr.strip()[-1500:]}"}
    told: dict[str, str] = json.loads(done.stdout)
    return told


def wrong(told: Mapping[str, Any]) -> list[str]:
    """The steps that failed."""
    return [f"{told['client']}, {name}: {what}" for name, what in told.items() if str(what).startswith("WRONG")]


def main() -> None:
    """Run, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, help="where the clients are kept between runs; else they are removed")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--only", default="", help="part of the name of a client")
    parser.add_argument("--steps", nargs="*", default=[], help="numbers of steps, such as 01 07; all by default")
    options = parser.parse_args()
    broken: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = options.cache or folder / "clients"
        text, image, picture = stack.enter_context(servers(folder))
        clients = {f"Python {version}": version for version in PYTHON} | {f"npm {NODE}": ""}
        for name, version in clients.items():
            words = python_client(version, cache) if version else node_client(cache)
            if options.only not in name or words is None:
                continue
            told = run(words, text, image, picture, options.steps)
            print(json.dumps(told, indent=1), flush=True)
            broken += wrong(told)
            if options.record:
                keep({name: {**told, "machine": machine(torch.device("cpu"))}}, "server-clients")
    print("\n".join(broken) or "every step of every client went well")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
