"""tests/integrations against several releases of Diffusers, one after the other.

    python benchmarks/drop_in_releases.py                    # 0.40.0, 0.41.0 and 0.42.1
    python benchmarks/drop_in_releases.py 0.41.0 -- -k vae   # one of them, some of the tests

Each release is installed into a folder of its own, with what it needs and is not here in a version that it takes, and
stands before the environment's own on the path. The counts of whole runs are kept in benchmarks/results/.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from records import keep

from frameloom.bench.paired import machine

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.40.0", "0.41.0", "0.42.1")


def install(release: str, folder: Path) -> None:
    """Diffusers, and what this release asks for and is not here."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*pip, "--no-deps", f"diffusers=={release}"], check=True)
    (found,) = metadata.distributions(name="diffusers", path=[str(folder)])
    wanted = [Requirement(line) for line in found.requires or () if "extra ==" not in line]
    missing = [f"{need.name}{need.specifier}" for need in wanted if not _is_here(need)]
    if missing:
        subprocess.run([*pip, *missing], check=True)


def _is_here(need: Requirement) -> bool:
    try:
        return need.specifier.contains(metadata.version(need.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def run_tests(folder: Path, options: list[str]) -> tuple[str, list[str]]:
    """The last line of pytest's, and the tests that failed."""
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "tests/integrations", "-q", "-rf", "-o", "addopts=", *options]
    run = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in run.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.strip())
    run.wait()
    return lines[-1] if lines else "nothing", [line for line in lines if line.startswith(("FAILED", "ERROR"))]


def counts(told: str) -> dict[str, int]:
    """How many passed, failed and were skipped, of pytest's last line."""
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", told)}
    return {"passed": 0, "failed": 0, "skipped": 0, **found}


def main() -> None:
    """Run them all, keep what came of it, and print a table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("releases", nargs="*", default=RELEASES)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    rows = []
    for release in asked.parse_args(sys.argv[1:split]).releases:
        with tempfile.TemporaryDirectory() as folder:
            install(release, Path(folder))
            told, failed = run_tests(Path(folder), sys.argv[split + 1 :])
        if not sys.argv[split + 1 :]:
            found = {**counts(told), "those that failed": failed, "machine": machine(torch.device("cpu"))}
            keep({f"Diffusers {release}": found}, "drop-in-releases")
        rows.append(f"| {release} | {told.strip('= ')} |")
        rows += [f"    {line}" for line in failed]
    print("\n| Diffusers | tests/integrations |\n|---|---|", *rows, sep="\n")
    sys.exit(any(line.startswith("    ") for line in rows))


if __name__ == "__main__":
    main()
