"""Workers that make no videos but do what prompts tell them: real processes that speak frameloom.wire. They start fast.

Words of a prompt: `steps=N` and `pause=S` between them, `die` (kill -9), `die=K` (in attempts up to K), `hang` (says
nothing, stops at nothing), `deaf` (does not hear a cancel), `late` (hears it after a step), `refuse`, `again` (fails,
and another attempt may do better), `full` (the disk is), `lie` (says that it is done, and left nothing).
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

from frameloom import wire
from frameloom.serve.workers.worker import Died

CARD = wire.Card(
    model="toy", defaults={"width": 64, "height": 32, "num_frames": 9, "steps": 4, "fps": 16.0, "guidance_scale": 5.0},
    width_multiple=16, height_multiple=16, temporal=4, takes=("image",), needs_image=False, previews=True,
    device="toy", dtype="none", torch="none",
)  # fmt: skip


class ToyWorker:
    def __init__(self, number: int, *, delay_s: float = 0.0) -> None:
        self.number, self.delay_s = number, delay_s
        self.trouble, self.card, self.usual_seconds, self.is_ready = "", None, None, False
        self.busy = False
        self.killed: list[str] = []
        self.orders: list[wire.Run] = []
        self.process: asyncio.subprocess.Process | None = None
        self._changed = asyncio.Event()

    async def keep(self) -> None:
        while True:
            ours, theirs = socket.socketpair()
            arguments = (__file__, str(theirs.fileno()), str(self.delay_s))
            self.process = await asyncio.create_subprocess_exec(sys.executable, *arguments, pass_fds=(theirs.fileno(),))
            theirs.close()
            reader, self._writer = await asyncio.open_connection(sock=ours)
            try:
                await self._listen(reader)
            finally:
                self.is_ready = False
                self._writer.close()
                self._kill()
                await self.process.wait()
            if self.busy:
                reason = self.killed[-1] if self.killed else f"ended with status {self.process.returncode}"
                self._outcome.set_result(Died(reason=reason))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        frames = wire.Frames(from_worker=True)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                for message in frames.feed(data):
                    self._hear(message)

    def _hear(self, message) -> None:
        if isinstance(message, wire.Ready):
            self.card, self.usual_seconds, self.is_ready = message.card, message.usual_seconds, True
            self._changed.set()
        elif isinstance(message, wire.News):
            self._on_news(message)
        elif self.busy:
            self._outcome.set_result(message)

    async def ready(self) -> None:
        while not self.is_ready or self.busy:
            self._changed.clear()
            await self._changed.wait()

    async def run(self, order, on_news):
        self.orders.append(order)
        self._outcome, self._on_news, self.busy = asyncio.get_running_loop().create_future(), on_news, True
        self._writer.write(wire.frame(order))
        try:
            return await self._outcome
        finally:
            self.busy = False
            self._changed.set()

    def cancel(self, job: str, fence: int) -> None:
        if self.busy:
            self._writer.write(wire.frame(wire.Cancel(job=job, fence=fence)))

    def kill(self, reason: str) -> None:
        self.killed.append(reason)
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)  # Popen.kill would collect its status behind asyncio's back

    async def foresee(self, request):
        return wire.Foreseen(number=1, seconds=12.5)


class ToyWorkers:
    def __init__(self, count: int = 1, *, delay_s: float = 0.0) -> None:
        self.all = [ToyWorker(number, delay_s=delay_s) for number in range(count)]
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(worker.keep()) for worker in self.all]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.all:
            worker.killed.append("was ended with the server")
            if worker.busy and not worker._outcome.done():
                worker._outcome.set_result(Died(reason="was ended with the server"))


class StoppedError(Exception):
    """The attempt was cancelled."""


class Toy:
    """The other side: the process."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._frames = wire.Frames(from_worker=False)
        self._heard: list[wire.Message] = []

    def say(self, message: wire.Message) -> None:
        self._socket.sendall(wire.frame(message))

    def hear(self, *, waits: bool) -> list[wire.Message]:
        self._socket.setblocking(waits)
        with contextlib.suppress(BlockingIOError):
            data = self._socket.recv(65536)
            if not data:
                os._exit(0)
            self._heard += self._frames.feed(data)
        self._socket.setblocking(True)
        heard, self._heard = self._heard, []
        return heard

    def live(self) -> None:
        self.say(wire.Ready(card=CARD, usual_seconds=2.0))
        while True:
            for order in self.hear(waits=True):
                if isinstance(order, wire.Run):
                    self.make(order)

    def make(self, order: wire.Run) -> None:
        known = {"job": order.job, "fence": order.fence}
        words = dict((*word.split("="), "")[:2] for word in order.request["prompt"].split())
        try:
            self._follow(order, words, known)
        except StoppedError:
            self.say(wire.Cancelled(**known))

    def _follow(self, order: wire.Run, words: dict[str, str], known: dict) -> None:
        with open(os.path.join(os.path.dirname(order.output), "..", "..", "attempts.log"), "a") as log:
            log.write(f"{order.job} {order.fence} {order.request['prompt']}\n")
        os.makedirs(order.journal, exist_ok=True)
        steps = int(words.get("steps", "2"))
        for step in range(1, steps + 1):
            self._pause(float(words.get("pause", "0")), deaf="deaf" in words or "late" in words)
            self._pause(0.0, deaf="deaf" in words)
            self.say(wire.News(**known, stage="denoise", step=step, total=steps, previewed=step))
        if "die" in words and order.fence <= int(words["die"] or 99):
            os.kill(os.getpid(), signal.SIGKILL)
        while "hang" in words:
            time.sleep(60)
        codes = {"refuse": "invalid_request", "again": "internal_error", "full": "insufficient_storage"}
        for word in codes.keys() & words.keys():
            self.say(wire.Failed(**known, code=codes[word], message=f"told to {word}", again=word == "again"))
            return
        self._done(order, known, lies="lie" in words)

    def _pause(self, seconds: float, *, deaf: bool) -> None:
        end = time.monotonic() + seconds
        while True:
            if not deaf and any(isinstance(message, wire.Cancel) for message in self.hear(waits=False)):
                raise StoppedError
            if time.monotonic() >= end:
                return
            time.sleep(0.005)

    def _done(self, order: wire.Run, known: dict, *, lies: bool) -> None:
        data = f"video of {sorted(order.request.items())}".encode()
        if not lies:
            for path in (order.output, order.thumbnail, order.sheet):
                Path(path).write_bytes(data)
        size = {"width": 64, "height": 32, "num_frames": 9, "fps": 16.0}
        digest = hashlib.sha256(data).hexdigest()
        self.say(wire.Done(**known, **size, num_bytes=len(data), sha256=digest, made={"seed": 1}))


if __name__ == "__main__":
    time.sleep(float(sys.argv[2]))
    Toy(int(sys.argv[1])).live()
