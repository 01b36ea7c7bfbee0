"""tests/integrations against several releases of Diffusers, one after the other.

    python benchmarks/drop_in_releases.py                    # 0.40.0, 0.41.0 and 0.42.1
    python benchmarks/drop_in_releases.py 0.41.0 -- -k vae   # one of them, some of the tests

Each release is installed into a folder of its own, with what it needs beside what is here, and stands before the
environment's own on the path.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("0.40.0", "0.41.0", "0.42.1")


def install(release: str, folder: Path) -> None:
    """Diffusers, and what this release asks for and is not here."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(folder)]
    subprocess.run([*pip, "--no-deps", f"diffusers=={release}"], check=True)
    (found,) = metadata.distributions(name="diffusers", path=[str(folder)])
    wanted = [line for line in found.requires or () if "extra ==" not in line]
    missing = [line for line in wanted if not _is_here(re.split(r"[^\w.-]", line)[0])]
    if missing:
        subprocess.run([*pip, *(line.partition(";")[0].strip() for line in missing)], check=True)


def _is_here(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


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


def main() -> None:
    """Run them all, and print a table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("releases", nargs="*", default=RELEASES)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    rows = []
    for release in asked.parse_args(sys.argv[1:split]).releases:
        with tempfile.TemporaryDirectory() as folder:
            install(release, Path(folder))
            told, failed = run_tests(Path(folder), sys.argv[split + 1 :])
        rows.append(f"| {release} | {told.strip('= ')} |")
        rows += [f"    {line}" for line in failed]
    print("\n| Diffusers | tests/integrations |\n|---|---|", *rows, sep="\n")
    sys.exit(any(line.startswith("    ") for line in rows))


if __name__ == "__main__":
    main()
