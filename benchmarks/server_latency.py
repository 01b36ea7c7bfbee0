"""How quickly the server answers, lets go of a job, and starts.

`python benchmarks/server_latency.py [--clients 200] [--seconds 20] [--record]`: retrieves by many polling clients, in a
process of their own, while nothing and while a job runs; from a cancel to the next job; from the start of the process
to the first job that is accepted. On a machine that does nothing else.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from records import keep
from served import Served, ask, served

from frameloom.bench.paired import machine

LONG = {"prompt": "a red circle rising", "size": "128x128", "num_frames": 81, "steps": 200, "seed": 3}
SMALL = {"prompt": "a red circle rising", "size": "64x64", "num_frames": 9, "steps": 2, "seed": 3}
EVERY_S = 1.0  # as the official clients poll
STARTS, CANCELS, STEPS = 7, 7, 4
CANCELLED = {"short steps": SMALL | {"size": "96x64", "num_frames": 17, "steps": 200}, "long steps": LONG}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, in milliseconds."""
    ranked = sorted(values)
    told = {f"p{p}": ranked[min(len(ranked) - 1, len(ranked) * p // 100)] for p in (50, 95, 99)}
    return {name: round(1e3 * value, 2) for name, value in (told | {"most": ranked[-1]}).items()}


async def _client(port: int, path: str, end: float, offset: float, told: list[float]) -> None:
    await asyncio.sleep(offset)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    while (begun := time.perf_counter()) < end:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise AssertionError(head)
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        took = time.perf_counter() - begun
        told.append(took)
        await asyncio.sleep(max(0.0, EVERY_S - took))
    writer.close()


def poll(port: int, path: str, clients: int, seconds: float, result: Any) -> None:
    """So many clients that retrieve one job, each once a second; their seconds go into a queue."""

    async def all_of_them() -> list[float]:
        told: list[float] = []
        end = time.perf_counter() + seconds
        await asyncio.gather(*(_client(port, path, end, EVERY_S * i / clients, told) for i in range(clients)))
        return told

    result.put(asyncio.run(all_of_them()))


def polled(server: Served, path: str, clients: int, seconds: float) -> dict[str, Any]:
    """What such clients saw."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=poll, args=(server.port, path, clients, seconds, result))
    process.start()
    told = result.get(timeout=seconds + 60)
    process.join()
    return {"requests": len(told), **percentiles(told)}


def until(server: Served, job: str, wanted: tuple[str, ...], *, seconds: float = 120.0) -> dict[str, Any]:
    """A job when its status is one of these."""
    end = time.monotonic() + seconds
    while (told := server.ask("GET", f"/v1/videos/{job}").json())["status"] not in wanted:
        if time.monotonic() > end:
            raise TimeoutError(f"{job} is {told}")
        time.sleep(0.002)
    return dict(told)


def latency(server: Served, clients: int, seconds: float) -> dict[str, Any]:
    """Retrieves while nothing runs, and while a job does."""
    small = server.ask("POST", "/v1/videos", SMALL).json()["id"]
    until(server, small, ("completed",))
    idle = polled(server, f"/v1/videos/{small}", clients, seconds)
    running = running_job(server)
    busy = polled(server, f"/v1/videos/{running}", clients, seconds)
    if until(server, running, ("in_progress", "completed", "failed"))["status"] != "in_progress":
        raise AssertionError("the job ended before the clients did")
    server.ask("DELETE", f"/v1/videos/{running}")
    return {"clients": clients, "each every s": EVERY_S, "idle, ms": idle, "while a job runs, ms": busy}


def running_job(server: Served, request: dict[str, Any] = LONG) -> str:
    """A job that is being denoised."""
    job = str(server.ask("POST", "/v1/videos", request).json()["id"])
    end = time.monotonic() + 120
    while not (told := until(server, job, ("in_progress",))).get("step") and time.monotonic() < end:
        time.sleep(0.01)
    assert told.get("step"), told
    return job


def cancelled(server: Served, request: dict[str, Any]) -> dict[str, float]:
    """From a cancel to the end of the job, and to the start of the next one, in seconds and in steps of the job."""
    job = running_job(server, request)
    step_s = seconds_per_step(server, job)
    waits = server.ask("POST", "/v1/videos", SMALL).json()["id"]
    begun = time.monotonic()
    server.ask("POST", f"/v1/videos/{job}/cancel")
    until(server, job, ("failed",))
    idle_s = time.monotonic() - begun
    until(server, waits, ("in_progress", "completed"))
    next_s = time.monotonic() - begun
    until(server, waits, ("completed",))
    done_s = time.monotonic() - begun
    return {"step_s": step_s, "idle_s": idle_s, "steps": idle_s / step_s, "next_s": next_s, "next_done_s": done_s}


def seconds_per_step(server: Served, job: str) -> float:
    """Of a running job, over some steps."""
    told: list[tuple[int, float]] = []
    while not told or told[-1][0] < told[0][0] + STEPS:
        step = server.ask("GET", f"/v1/videos/{job}").json()["step"]
        if not told or step > told[-1][0]:
            told.append((step, time.monotonic()))
        time.sleep(0.002)
    del told[0]  # seen in the middle of its step
    return (told[-1][1] - told[0][1]) / (told[-1][0] - told[0][0])


def first_job_s(folder: Path, i: int) -> tuple[float, int]:
    """From the start of a server on a new folder to its first accepted job; lines of libtorch in its memory map."""
    server = Served(data=folder / f"start-{i}", environment={"OMP_NUM_THREADS": "1"})
    begun = time.monotonic()
    server.start(wait=False)
    try:
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(server.port, "POST", "/v1/videos", SMALL, timeout=10).status == 200:
                    break
            if time.monotonic() > begun + 60:
                raise TimeoutError(server.log.read_text()[-2000:])
            time.sleep(0.005)
        return time.monotonic() - begun, Path(f"/proc/{server.pid}/maps").read_text().count("libtorch")
    finally:
        server.kill()


def middle_and_most(values: Sequence[float]) -> dict[str, float]:
    """The median, and the largest."""
    return {"median": round(statistics.median(values), 4), "most": round(max(values), 4)}


def main() -> None:
    """Measure, print, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = [first_job_s(folder, i) for i in range(STARTS)]
        with served(folder / "data", environment={"OMP_NUM_THREADS": "1"}) as server:
            server.wait_for("/health/ready", 120)
            table = latency(server, options.clients, options.seconds)
            cancels = {name: [cancelled(server, asked) for _ in range(CANCELS)] for name, asked in CANCELLED.items()}
    record = {
        "machine": machine(torch.device("cpu")),
        "retrieve": table,
        "cancel": {
            name: {key: middle_and_most([one[key] for one in many]) for key in many[0]}
            for name, many in cancels.items()
        },
        "first accepted job, s": middle_and_most([seconds for seconds, _ in starts]),
        "torch in the HTTP process": any(count for _, count in starts),
    }
    print(json.dumps(record, indent=1))
    if options.record:
        keep({"latency": record}, "server-latency")
    sys.exit(1 if record["torch in the HTTP process"] else 0)


if __name__ == "__main__":
    main()
