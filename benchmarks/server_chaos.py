"""A server that is struck at random moments while clients are at it: nothing that was acknowledged is ever lost.

`python benchmarks/server_chaos.py [--moments 1000] [--seed 1] [--record FILE]`: kills of the server, of a worker, of
both, workers that stand still for a while, ends that are asked for; each time the server starts again at once on the
same data folder. What clients were told is kept beside (`chaos/ledger.py`), and the server is held to it. Exit code 1
if a promise was broken. The built-in model on the CPU.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from chaos.asks import ASKS, Ask
from chaos.clients import Client
from chaos.ledger import KEYS, Ledger
from served import Served, marked, served

PAUSES_S = (0.5, 2.0, 6.0)  # at most, between two moments
REST = 50  # moments between two rests, in which all is counted
OPTIONS = ("--workers", "2", "--grace", "3", "--max-queue", "400", "--max-queue-per-key", "400")
STRIKES = {"worker": 45, "server": 22, "both": 12, "stop a worker": 11, "ask the server to end": 8, "hang": 2}
EARLY = (143, -signal.SIGTERM)  # exit codes of a server that is asked to end before it is one
HANG_S = 25.0  # longer than the server waits for a sign of life


class Striker:
    """Strikes a server, and starts it again where it is gone."""

    def __init__(self, server: Served, ledger: Ledger, rng: random.Random) -> None:
        self.server, self.ledger, self.rng = server, ledger, rng
        self.moments: Counter[str] = Counter()
        self.past: list[tuple[str, float]] = []  # marks of starts that are over, and when they ended
        self._waking: list[threading.Timer] = []

    def strike(self) -> None:
        """One moment."""
        kind = self.rng.choices(list(STRIKES), list(STRIKES.values()))[0]
        workers = self.server.workers()
        if kind in ("worker", "stop a worker", "hang"):
            if not workers:
                return
            self._strike_worker(kind, self.rng.choice(workers))
        else:
            self._strike_server(kind, workers)
        self.moments[kind] += 1

    def _strike_worker(self, kind: str, pid: int) -> None:
        self.ledger.struck(kind)
        with contextlib.suppress(OSError):
            if kind == "worker":
                os.kill(pid, signal.SIGKILL)
                return
            os.kill(pid, signal.SIGSTOP)
            pause = HANG_S if kind == "hang" else self.rng.uniform(0.05, 4)
            timer = threading.Timer(pause, _wake, (pid,))
            timer.daemon = True
            timer.start()
            self._waking = [one for one in self._waking if one.is_alive()] + [timer]

    def _strike_server(self, kind: str, workers: list[int]) -> None:
        self.ledger.struck(kind)
        mark = self.server.mark
        if kind == "ask the server to end":
            answers = self.server.answers()
            self.server.signal(signal.SIGTERM)
            if self.rng.random() < 0.3:
                time.sleep(self.rng.uniform(0, 1))
                self.server.signal(signal.SIGTERM)
            code = self.server.stop(40.0)
            if code and (answers or code not in EARLY):
                self.ledger.wrong(f"asked to end, the server ended with {code}")
        else:
            if kind == "both" and workers:
                with contextlib.suppress(OSError):
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
            self.server.kill()
        self.past.append((mark, time.monotonic()))
        self.server.start(wait=self.rng.random() < 0.8)

    def check_orphans(self, seconds: float = 15.0) -> None:
        """Of starts that ended so long ago, nothing may be left."""
        now = time.monotonic()
        for mark, ended in self.past:
            if now - ended > seconds:
                for pid in marked(mark):
                    self.ledger.wrong(f"process {pid} outlived its server by {now - ended:.0f} s")
                    os.kill(pid, signal.SIGKILL)
        self.past = [(mark, ended) for mark, ended in self.past if now - ended <= seconds]

    def wake_all(self) -> None:
        """Nobody stands still afterwards."""
        for timer in self._waking:
            timer.cancel()
        for pid in self.server.workers():
            _wake(pid)


def _wake(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGCONT)


def undisturbed(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The sha256 of the video of every request that clients make, by a server that is left in peace."""
    with served(folder / "calm", *OPTIONS, environment=environment) as server:
        server.wait_for("/health/ready", 180)  # what starts from a video is taken when the model is known
        jobs = {ask.name: ask.sent(server) for ask in ASKS}
        return {name: Ask.digest(server, job) for name, job in jobs.items()}


def chaos(server: Served, ledger: Ledger, *, moments: int, seed: int, num_clients: int) -> Striker:
    """Strike a server so many times while clients are at it, with a rest now and then."""
    striker = Striker(server, ledger, random.Random(seed))
    clients = [Client(server.port, ledger, list(KEYS)[i % len(KEYS)], seed=1000 * seed + i) for i in range(num_clients)]
    for client in clients:
        client.start()
    count, rested = 0, 0
    while count < moments and not ledger.broken:
        time.sleep(striker.rng.uniform(0, striker.rng.choice(PAUSES_S)))
        striker.strike()
        striker.check_orphans()
        count = striker.moments.total()
        if count - rested >= REST and count < moments:
            rested = count
            rest(striker, clients, ledger)
            print(f"{count} moments, {ledger.summary()}", file=sys.stderr, flush=True)
    rest(striker, clients, ledger)
    for client in clients:
        client.end()
    return striker


def rest(striker: Striker, clients: list[Client], ledger: Ledger) -> None:
    """Let all jobs end, start the server once more, and hold it to all that it has said, files included."""
    for client in clients:
        client.pause()
    striker.wake_all()
    server = striker.server
    server.wait_for("/health/live")
    ledger.settle(server)
    mark = server.mark
    if code := server.stop(60.0):
        ledger.wrong(f"at rest, the server ended with {code}")
    if left := server.orphans(mark):
        ledger.wrong(f"processes {left} outlived their server")
    server.start()
    ledger.settle(server)
    ledger.check_files(server.data)
    for client in clients:
        client.resume()


def main() -> None:
    """Strike, count, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the data and the log; else they are removed")
    parser.add_argument("--cache", help="FRAMELOOM_CACHE of the servers; by default an empty one")
    options = parser.parse_args()
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys = folder / "keys.toml"
        keys.write_text("".join(f'[{name}]\nsecret = "{secret}"\n' for name, secret in KEYS.items()))
        keys.chmod(0o600)
        environment = {"OMP_NUM_THREADS": "1", "FRAMELOOM_CACHE": options.cache or f"{folder}/cache"}
        ledger = Ledger(wanted=undisturbed(folder, environment))
        server = stack.enter_context(served(folder / "data", "--keys", str(keys), *OPTIONS, environment=environment))
        struck = chaos(server, ledger, moments=options.moments, seed=options.seed, num_clients=options.clients)
    record = outcome(struck, ledger) | {"seed": options.seed, "seconds": round(time.monotonic() - begun)}
    print(json.dumps(record, indent=1))
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if ledger.broken else 0)


def outcome(striker: Striker, ledger: Ledger) -> dict[str, Any]:
    """The record of a run."""
    return {
        "moments": striker.moments.total(),
        "kinds": dict(striker.moments),
        **ledger.counts(),
        "broken": ledger.broken,
    }


if __name__ == "__main__":
    main()
