"""Posts against a full queue: each is refused, none is kept, and the server does not grow."""

import http.client
import json
import threading
import time
from collections import Counter
from typing import Any

from served import Served, form, rss_bytes

LONG = {"prompt": "a red circle rising", "size": "128x128", "num_frames": 81, "steps": 200, "seed": 3}
CONNECTIONS = 8
GROWTH_BYTES = 24 * 2**20
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(2**20)


def flood(server: Served, posts: int) -> tuple[dict[str, Any], list[str]]:
    """The record, and what was wrong."""
    while server.ask("POST", "/v1/videos", LONG).status == 200:
        pass
    before = len(server.ask("GET", "/v1/videos?limit=100").json()["data"])
    files, statuses, broken, rss = _files(server), Counter[int](), [], [rss_bytes(server.pid)]
    begun = time.monotonic()
    threads = [
        threading.Thread(target=_post, args=(server.port, posts // CONNECTIONS, statuses, broken))
        for _ in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        rss.append(rss_bytes(server.pid))
    seconds = time.monotonic() - begun
    if set(statuses) != {429}:
        broken.append(f"statuses against a full queue: {dict(statuses)}")
    if len(server.ask("GET", "/v1/videos?limit=100").json()["data"]) != before or _files(server) != files:
        broken.append("something was kept of what was refused")
    grown = max(rss) - rss[len(rss) // 4]
    if grown > GROWTH_BYTES:
        broken.append(f"the server has grown by {grown} bytes in {posts} refusals")
    told = {
        "posts": statuses.total(),
        "seconds": round(seconds, 1),
        "rss_first": rss[0],
        "rss_most": max(rss),
        "grown_bytes": grown,
    }
    return told, broken


def _files(server: Served) -> list[str]:
    """What lies in the data folder, what a running job writes aside."""
    return sorted(path.name for path in (server.data / "videos").iterdir())


def _post(port: int, count: int, statuses: "Counter[int]", broken: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    picture, picture_headers = form(LONG, {"input_reference": ("x.png", PICTURE)})
    for i in range(count):
        body, headers = (
            (picture, picture_headers) if i % 100 == 99 else (json.dumps(LONG), {"Content-Type": "application/json"})
        )
        for _ in range(2):  # a refusal before the end of the body may end the connection
            try:
                connection.request("POST", "/v1/videos", body, headers)
                break
            except (BrokenPipeError, ConnectionResetError):
                connection.close()
        try:
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            broken.append(f"a post was not answered: {error!r}")
            connection.close()
            continue
        statuses[answer.status] += 1
        pause = answer.headers.get("retry-after", "")
        if answer.status == 429 and not (pause.isdigit() and 1 <= int(pause) <= 120):
            broken.append(f"Retry-After is {pause!r}")
