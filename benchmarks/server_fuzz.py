"""Requests that the server's OpenAPI allows, some that it does not, and bytes that are no requests at all.

`python benchmarks/server_fuzz.py [--requests 10000] [--posts 20000] [--seed 1] [--record]`: schemathesis makes two
thirds of the requests, fuzz/raw.py the others; then posts against a full queue. Every answer has a status that the
document declares for it, an error the one shape and a request id, and the HTTP process does not grow. Exit code 1 else.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
import torch
from fuzz.flood import flood
from fuzz.raw import RAW, Raw
from records import keep
from schemathesis import GenerationMode
from served import Served, rss_bytes, served

from frameloom.bench.paired import machine

EVERY = 250  # requests between two readings of the memory
GROWTH_BYTES = 48 * 2**20  # that the HTTP process may grow by from the middle of a run on
UPLOAD_BYTES = 2**30
ENDLESS = "/events"  # answers as long as a job lasts


@dataclass(kw_only=True, slots=True)
class Findings:
    """Answers by status, readings of memory, and what was wrong."""

    server: Served
    statuses: Counter[str] = field(default_factory=Counter)
    rss: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    sent: int = 0

    def answered(self, what: str, status: int, headers: Any, body: bytes, declared: set[str] | None) -> None:
        """One answer; `declared`: the statuses that the document knows for it, None for what is no operation of it."""
        self.statuses[str(status)] += 1
        self._count()
        if declared is not None and str(status) not in declared and f"{status // 100}XX" not in declared:
            self.wrong(f"{what}: {status} is not declared: {body[:200]!r}")
        if status >= 500 and (declared is None or str(status) not in declared):
            self.wrong(f"{what}: {status}: {body[:200]!r}")
        if status >= 400:
            self._check_error(what, status, headers, body)
        if not headers.get("x-request-id"):
            self.wrong(f"{what}: {status} without x-request-id")

    def closed(self) -> None:
        """A request to which nothing is answered, as it was none."""
        self.statuses["closed"] += 1
        self._count()

    def wrong(self, what: str) -> None:
        """The same only once."""
        if what not in self.broken and len(self.broken) < 200:
            self.broken.append(what)
            print(f"WRONG {what}", file=sys.stderr, flush=True)

    def _check_error(self, what: str, status: int, headers: Any, body: bytes) -> None:
        try:
            error = json.loads(body)["error"]
            fine = isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
            fine = fine and {"code", "param"} <= set(error)
        except (ValueError, KeyError, TypeError):
            fine = what.startswith("HEAD ") and not body
        if not fine:
            self.wrong(f"{what}: {status} has not the shape of an error: {body[:200]!r}")

    def _count(self) -> None:
        self.sent += 1
        if self.sent % EVERY == 0:
            self.rss.append(rss_bytes(self.server.pid))
            empty(self.server)

    def growth_bytes(self) -> int:
        """Of the HTTP process, from the middle of the run to its end."""
        return self.rss[-1] - self.rss[len(self.rss) // 2] if self.rss else 0


def empty(server: Served) -> None:
    """Delete all jobs, else all that is created is soon one too many."""
    for video in server.ask("GET", "/v1/videos?limit=100").json()["data"]:
        server.ask("DELETE", f"/v1/videos/{video['id']}")


def fuzz_operations(findings: Findings, count: int, seed: int) -> None:
    """So many requests of every operation of the document: those that it allows, and as many that it does not."""
    url = f"http://127.0.0.1:{findings.server.port}"
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    operations = [operation for operation in found if not operation.path.endswith(ENDLESS)]
    with requests.Session() as session:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                each = max(1, count // (2 * len(operations)))
                with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing to be got wrong
                    _test_of(operation, mode, each, seed, findings, session, url)()


def _test_of(
    operation: Any, mode: GenerationMode, count: int, seed: int, findings: Findings, session: requests.Session, url: str
) -> Callable[[], None]:
    declared = set(operation.definition.raw.get("responses", {}))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def test(case: Any) -> None:
        what = f"{operation.method.upper()} {operation.path}"
        try:
            answer = case.call(base_url=url, session=session, timeout=60)
        except (requests.RequestException, ValueError) as error:
            if findings.server.process is not None and findings.server.process.poll() is not None:
                raise AssertionError("the server has ended") from error
            findings.closed()
            return
        headers = {name.lower(): values[0] for name, values in answer.headers.items()}
        # What never reaches an operation, as its path is another one's or none, is not declared by it.
        known = declared | {"404", "405"} if mode is GenerationMode.NEGATIVE else declared
        findings.answered(what, answer.status_code, headers, answer.content, known)

    return test


def fuzz_raw(findings: Findings, count: int, seed: int) -> None:
    """Bytes: requests cut off, bodies of another length than announced, forms that are none, headers of all kinds."""
    raw = Raw(findings.server.port, seed)
    for i in range(count):
        what = RAW[i % len(RAW)]
        answer = raw.send(what)
        if answer is None:
            findings.closed()
        else:
            findings.answered(f"raw {what}", answer.status, answer.headers, answer.body, None)


def upload(findings: Findings) -> dict[str, Any]:
    """A body without an end: how much of it was taken, what was answered, and how much the server grew meanwhile."""
    before = rss_bytes(findings.server.pid)
    told = Raw(findings.server.port, 0).upload(UPLOAD_BYTES, lambda: rss_bytes(findings.server.pid))
    told["grown_bytes"] = told.pop("peak") - before
    if told["status"] not in (413, None) or told["grown_bytes"] > 2 * GROWTH_BYTES:
        findings.wrong(f"a chunked upload: {told}")
    return told


def main() -> None:
    """Send, count, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--posts", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    record: dict[str, Any] = {"seed": options.seed, "machine": machine(torch.device("cpu"))}
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {"OMP_NUM_THREADS": "1", "FRAMELOOM_CACHE": f"{folder}/cache"}
        with served(folder / "fuzzed", "--max-queue", "50", environment=environment) as server:
            server.wait_for("/health/ready", 120)
            findings, begun = Findings(server=server), time.monotonic()
            fuzz_operations(findings, options.requests * 2 // 3, options.seed)
            fuzz_raw(findings, options.requests - findings.sent, options.seed)
            record["fuzz"] = {
                "requests": findings.sent, "seconds": round(time.monotonic() - begun), "statuses": findings.statuses,
                "rss_bytes": findings.rss, "grown_bytes": findings.growth_bytes(), "upload": upload(findings),
            }  # fmt: skip
            if findings.growth_bytes() > GROWTH_BYTES:
                findings.wrong(f"the server has grown by {findings.growth_bytes()} bytes")
            server.wait_for("/health/live")
            broken += findings.broken
        with served(folder / "flooded", "--max-queue", "3", environment=environment) as server:
            server.wait_for("/health/ready", 120)
            record["full queue"], wrong = flood(server, options.posts)
            broken += wrong
    print(json.dumps(record | {"broken": broken}, indent=1))
    if options.record:
        keep({"fuzz": record | {"broken": broken}}, "server-fuzz")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
