"""A service that keeps jobs in memory and makes nothing: for tests of how HTTP looks, and of nothing behind it."""

import asyncio
import contextlib
import hashlib
import secrets
import threading
import time
from dataclasses import replace
from pathlib import Path

import uvicorn

from frameloom.serve.api.app import make_app
from frameloom.serve.config import ServeConfig
from frameloom.serve.jobs.job import Job, JobError, Result
from frameloom.serve.service import RefusedError, Standing
from frameloom.wire import Card, Foreseen

CARD = Card(
    model="small", width_multiple=16, height_multiple=16, temporal=4, takes=("image", "video", "references"),
    needs_image=False, previews=True, device="cpu", dtype="float32", torch="2", experts=1,
    defaults={
        "width": 96, "height": 64, "num_frames": 33, "fps": 16.0, "steps": 8, "guidance_scale": 3.0,
        "guidance_scale_2": None, "flow_shift": 3.0, "negative_prompt": "",
    },
)  # fmt: skip


class MemoryService:
    def __init__(self, folder: Path, card: Card | None = CARD) -> None:
        self.root, self.card = folder, card
        self.jobs: dict[str, Standing] = {}
        self.repeats: dict[tuple[str, str], tuple[str, str]] = {}
        self.refusal: RefusedError | None = None
        self.planned: Foreseen | None = None
        self.is_ready, self.trouble = True, ""
        self.changed = asyncio.Event()

    def new_id(self):
        return f"video_{secrets.token_hex(16)}"

    def check_room(self, key, work_s):
        if self.refusal is not None:
            raise self.refusal

    async def repeated(self, key, repeat):
        known, digest = self.repeats.get((key, repeat.name), ("", repeat.digest))
        if digest != repeat.digest:
            raise RefusedError("idempotency_mismatch", "that key came before with another request")
        return self.jobs.get(known)

    async def accept(self, job_id, ask, inputs, repeat):
        if repeat is not None:
            known, digest = self.repeats.setdefault((ask.key, repeat.name), (job_id, repeat.digest))
            if digest != repeat.digest:
                raise RefusedError("idempotency_mismatch", "that key came before with another request")
            if known in self.jobs:
                return self.jobs[known]
        self.check_room(ask.key, 0)
        for name, data in inputs.items():
            file = self.folder(job_id) / "inputs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        self.jobs[job_id] = Standing(job=Job(id=job_id, ask=ask, status="queued", created_at=time.time()), position=0)
        return self.jobs[job_id]

    async def standing(self, job_id):
        return self.jobs.get(job_id)

    async def page(self, key, *, after, limit, newest_first):
        mine = [standing for standing in self.jobs.values() if standing.job.ask.key == key]
        mine = mine[::-1] if newest_first else mine
        if after is not None:
            names = [standing.job.id for standing in mine]
            if after not in names:
                return None
            mine = mine[names.index(after) + 1 :]
        return mine[:limit], len(mine) > limit

    async def cancel(self, job_id):
        if job_id in self.jobs and self.jobs[job_id].job.status in ("queued", "in_progress"):
            self.fail(job_id, "cancelled")
        return self.jobs.get(job_id)

    async def delete(self, job_id):
        self.repeats = {name: repeat for name, repeat in self.repeats.items() if repeat[0] != job_id}
        return self.jobs.pop(job_id, None) is not None

    async def watch(self, job_id):
        while (standing := self.jobs.get(job_id)) is not None:
            yield standing
            if standing.job.status in ("completed", "failed"):
                return
            while self.jobs.get(job_id) is standing:
                await asyncio.sleep(0.01)

    async def foresee(self, request):
        if self.planned is not None:
            return self.planned
        return Foreseen(number=1, seconds=2.5, memory_bytes=10**9, resolved={"steps": request.get("steps", 8)})

    def work_s(self, request):
        return 1.0

    def folder(self, job_id):
        return self.root / job_id

    def numbers(self):
        return {"queued": float(len(self.jobs))}

    def set(self, job_id, **changes):
        standing = self.jobs[job_id]
        of_job = {name: changes.pop(name) for name in list(changes) if hasattr(standing.job, name)}
        self.jobs[job_id] = replace(standing, job=replace(standing.job, **of_job), **changes)

    def fail(self, job_id, code):
        self.set(job_id, status="failed", error=JobError(code=code, message="it was asked to end"))

    def complete(self, job_id, data, **result):
        folder = self.folder(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"video": "video-1.mp4", "thumbnail": "thumbnail-1.jpg", "sheet": "sheet-1.jpg"}
        for name, file in files.items():
            (folder / file).write_bytes(data if name == "video" else name.encode())
        told = {"width": 96, "height": 64, "num_frames": 33, "fps": 16.0} | result
        result = Result(**files, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **told)
        self.set(job_id, status="completed", progress=100, result=result, completed_at=time.time(), fence=1)


@contextlib.contextmanager
def served(service, config: ServeConfig):
    """The application on a free port, in a thread; gives its address and itself."""
    app = make_app(service, config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))

    async def serve():
        app.state.loop = asyncio.get_running_loop()
        await server.serve()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
