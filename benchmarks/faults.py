"""Ranks and launchers that are killed or stopped at random moments: all end, nothing is orphaned, no file is half.

`python benchmarks/faults.py [--rounds 200] [--seed 0] [--gpus 2]`: the built-in model on the CPU; exit code 1 if a
promise was broken. Needs Linux: every process of a round is found by a variable of its environment.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from frameloom.errors import FrameloomError
from frameloom.pipeline.media import read_frames

ENDED_S = 10.0  # the launcher, after the fault
ORPHANED_S = 2.0  # any other process, after the launcher
MARK = "FRAMELOOM_FAULT_ROUND"
FRAMES = 17
LAUNCHER = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to whom (a rank, or LAUNCHER), so many seconds after the start."""

    victim: int
    number: signal.Signals
    at_s: float

    @property
    def name(self) -> str:
        """Such as "rank 1 SIGKILL"."""
        return f"{'launcher' if self.victim == LAUNCHER else f'rank {self.victim}'} {self.number.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of a run: `struck` if the victim was there, `code` None if it did not end.

    It ended `ended_s` after the fault, or `lasted_s` after its start; its last process `orphaned_s` later.
    """

    struck: bool
    code: int | None
    lasted_s: float
    ended_s: float
    orphaned_s: float
    broken: tuple[str, ...]


def processes(mark: str) -> dict[int, int]:
    """The living processes of a round: their numbers, and which rank each is (LAUNCHER: none)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
            dead = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            continue
        if not dead and f"{MARK}={mark}".encode() in words:
            ranks = [int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK=")]
            found[int(folder.name)] = ranks[0] if ranks else LAUNCHER
    return found


def start(gpus: int, output: Path, mark: str) -> subprocess.Popen[str]:
    """One run of the command."""
    command = [
        sys.executable, "-m", "frameloom", "generate", "a red circle", "--device", "cpu", "--gpus", str(gpus),
        "--frames", str(FRAMES), "--steps", "6", "--no-journal", "--quiet", "--output", str(output),
    ]  # fmt: skip
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def strike(fault: Fault, launcher: subprocess.Popen[str], mark: str) -> bool:
    """Do it to the victim, if it is there; the first process of a rank is the one that the launcher started."""
    victims = [pid for pid, rank in sorted(processes(mark).items()) if rank == fault.victim]
    if not victims or launcher.poll() is not None:
        return False
    try:
        os.kill(launcher.pid if fault.victim == LAUNCHER else victims[0], fault.number)
    except ProcessLookupError:
        return False
    return True


def seconds_until(happens: Callable[[], bool], limit_s: float) -> float:
    """How long it takes; infinite past the limit."""
    begun = time.monotonic()
    while not happens():
        if time.monotonic() - begun > limit_s:
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - begun


def run(fault: Fault, gpus: int, patience_s: float) -> Result:
    """One round, from the start to a clean table."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "video.mp4"
        launcher, begun = start(gpus, output, mark), time.monotonic()
        seconds_until(lambda: launcher.poll() is not None, fault.at_s)
        struck = strike(fault, launcher, mark)
        ended_s = seconds_until(lambda: launcher.poll() is not None, ENDED_S if struck else patience_s)
        lasted_s = time.monotonic() - begun
        orphaned_s = seconds_until(lambda: not processes(mark), ORPHANED_S)
        for pid in processes(mark):
            os.kill(pid, signal.SIGKILL)
        said = launcher.communicate()[1]
        hung = ended_s == float("inf")
        broken = [
            f"the launcher had not ended after {ENDED_S:.0f} s" if hung else "",
            "a process was orphaned" if orphaned_s == float("inf") and not hung else "",
            *file_faults(output, finished=launcher.returncode == 0),
            "" if not struck or launcher.returncode == 0 else naming_fault(fault, said),
        ]
        return Result(
            struck=struck,
            code=None if hung else launcher.returncode,
            lasted_s=lasted_s,
            ended_s=ended_s,
            orphaned_s=orphaned_s,
            broken=tuple(filter(None, broken)),
        )


def file_faults(output: Path, *, finished: bool) -> list[str]:
    """What is wrong with what lies in the output's folder."""
    faults = [f"{path.name} was left" for path in output.parent.iterdir() if path != output]
    if output.exists():
        try:
            count = len(read_frames(output)[0])
        except (FrameloomError, OSError) as error:
            return [*faults, f"the video does not decode: {error}"]
        return faults if count == FRAMES else [*faults, f"the video has {count} of {FRAMES} frames"]
    return [*faults, "there is no video after exit code 0"] if finished else faults


def naming_fault(fault: Fault, said: str) -> str:
    """What is wrong with the message of a rank's fault: it names the rank, in one line, without a traceback."""
    if fault.victim == LAUNCHER or re.fullmatch(f"frameloom: rank {fault.victim} was [^\n]*\n", said):
        return ""
    return f"the message does not name rank {fault.victim}: {said[-500:]!r}"


def random_fault(chance: random.Random, gpus: int, whole_s: float) -> Fault:
    """A fault at a moment of a run that takes `whole_s`."""
    victim = chance.randrange(LAUNCHER, gpus)
    to_launcher = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)  # a stopped launcher only waits to be continued
    numbers = to_launcher if victim == LAUNCHER else (signal.SIGKILL, signal.SIGSTOP)
    return Fault(victim=victim, number=chance.choice(numbers), at_s=chance.uniform(0, whole_s))


def main() -> None:
    """Strike, print a table, and exit with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=2)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    never = Fault(victim=LAUNCHER, number=signal.SIGKILL, at_s=120.0)
    run(never, options.gpus, 0)  # builds and measures kernels, where it is the first
    undisturbed = run(never, options.gpus, 0)
    if undisturbed.code != 0:
        sys.exit("a run without a fault failed")
    whole_s = undisturbed.lasted_s
    print(f"a run without a fault takes {whole_s:.1f} s; {options.rounds} rounds with seed {options.seed}", flush=True)
    results: dict[str, list[Result]] = {}
    with contextlib.suppress(KeyboardInterrupt):  # what was found until then is told
        strike_all(chance, options, whole_s, results)
    print_table(results)
    sys.exit(any(result.broken for all_of_it in results.values() for result in all_of_it))


def strike_all(
    chance: random.Random, options: argparse.Namespace, whole_s: float, results: dict[str, list[Result]]
) -> None:
    """All rounds, one after the other."""
    for number in range(options.rounds):
        fault = random_fault(chance, options.gpus, whole_s)
        result = run(fault, options.gpus, 5 * whole_s)
        if not result.struck:
            whole_s = min(whole_s, result.lasted_s)  # the machine has less else to do by now
        results.setdefault(fault.name if result.struck else "too late", []).append(result)
        for broken in result.broken:
            print(f"round {number}, {fault.name} at {fault.at_s:.2f} s: {broken}", flush=True)


def print_table(results: dict[str, list[Result]]) -> None:
    """One line for each kind of fault."""
    print(f"{'fault':<20}{'rounds':>7}{'finished':>9}{'ended after':>13}{'(most)':>8}{'orphans':>9}{'broken':>8}")
    for name, them in sorted(results.items()):
        ended = sorted(result.ended_s for result in them)
        finished = sum(result.code == 0 for result in them)
        orphans, broken = max(result.orphaned_s for result in them), sum(bool(result.broken) for result in them)
        times = f"{ended[len(ended) // 2]:>11.2f} s{ended[-1]:>6.2f} s{orphans:>7.2f} s"
        print(f"{name:<20}{len(them):>7}{finished:>9}{times}{broken:>8}")


if __name__ == "__main__":
    main()
