"""The log: lines that machines and people read, whose request each belongs to, and nothing that stalls the server."""

import io
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time

from frameloom.serve.logs import TALK, Talk, _are_written, logging_to

LOG = logging.getLogger("frameloom")


def told(style, *says, level=logging.INFO):
    stream = io.StringIO()
    with logging_to(stream, style=style, level=level):
        for say in says:
            say()
    return stream.getvalue().splitlines()


def test_json_lines_carry_what_is_known():
    def say():
        token = TALK.set(Talk(request="req_1", key="alice"))
        LOG.info("started %s", "it", extra={"job": "video_1", "fence": 3, "worker": 0})
        TALK.reset(token)
        LOG.warning("no request here")

    first, second = map(json.loads, told("json", say))
    assert (first["level"], first["message"]) == ("info", "started it")
    assert (first["request"], first["key"]) == ("req_1", "alice")
    assert (first["job"], first["fence"], first["worker"]) == ("video_1", 3, 0)
    assert first["time"].endswith("Z")
    assert "request" not in second


def test_a_job_that_a_line_names_goes_before_that_of_its_request():
    def say():
        token = TALK.set(Talk(request="req_1", job="video_1"))
        LOG.info("swept", extra={"job": "video_2"})
        TALK.reset(token)

    (line,) = map(json.loads, told("json", say))
    assert line["job"] == "video_2"


def test_nobody_can_forge_a_line():
    def say():
        LOG.info("name %s", "a\n2026-11-22T00:00:00Z info forged", extra={"path": "/v1/\r\nforged\x1b[31m"})

    assert len(told("text", say)) == 1
    assert "\x1b" not in told("text", say)[0]
    assert len(told("json", say)) == 1


def test_errors_bring_their_trace():
    def say():
        try:
            raise ValueError("it broke")
        except ValueError:
            LOG.exception("a request failed")

    (line,) = map(json.loads, told("json", say))
    assert "ValueError: it broke" in line["trace"]
    lines = told("text", say)
    assert lines[0].endswith("error   a request failed")
    assert lines[-1] == "ValueError: it broke"


def test_the_level_holds_and_other_libraries_are_heard_from_warnings_on():
    def say():
        LOG.debug("not this")
        logging.getLogger("uvicorn.error").info("nor this")
        logging.getLogger("uvicorn.error").warning("but this")

    assert [line.split(" ", 1)[1] for line in told("text", say)] == ["warning but this"]


def test_the_handlers_from_before_are_back_afterwards():
    before = LOG.handlers[:], LOG.level, LOG.propagate
    told("text", lambda: LOG.info("x"))
    assert (LOG.handlers, LOG.level, LOG.propagate) == before


def test_a_reader_that_stalls_does_not_keep_the_process_from_ending():
    code = """
import logging
from frameloom.serve import logs
logs._STALLED_S = 0.1
with logs.logging_to():
    for length in (10, 20_000, 10):
        for _ in range(300):
            logging.getLogger("frameloom").info("x" * length)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(30) == 0  # though nobody reads
        finally:
            process.kill()
        assert process.stderr.read().startswith(b"20")


def test_the_end_waits_for_lines_as_long_as_any_are_written():
    lines = queue.Queue()

    class Slow(threading.Condition):
        """While one waits, the time ends, and another line is written."""

        def wait(self, timeout=None):
            self.release()
            lines.task_done()
            self.acquire()
            return False

    for number in range(50):
        lines.put(number)
    lines.all_tasks_done = Slow(lines.mutex)
    assert _are_written(lines)


def test_a_reader_that_takes_its_time_gets_all_lines(monkeypatch):
    monkeypatch.setattr("frameloom.serve.logs._STALLED_S", 30.0)
    reader, writer = os.pipe()
    lines = []

    def read():
        with os.fdopen(reader) as file:
            for line in file:
                lines.append(line)
                if len(lines) % 500 == 0:
                    time.sleep(0.01)

    thread = threading.Thread(target=read)
    with os.fdopen(writer, "w") as stream, logging_to(stream):
        for number in range(2000):
            LOG.info("line %d %s", number, "é" * 50)
        thread.start()
    thread.join()
    assert [int(line.split()[3]) for line in lines] == list(range(2000))


def test_a_reader_that_stalls_does_not_stall_the_server(monkeypatch):
    monkeypatch.setattr("frameloom.serve.logs._KEPT", 1_000)
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", buffering=1)
    count = 5_000  # far more than a pipe and the queue hold
    with logging_to(stream, style="json"):
        for number in range(count):
            LOG.info("line %d", number)  # returns at once, though nobody reads
        lines = []

        def read():
            with os.fdopen(reader) as file:
                lines.extend(map(json.loads, file))

        thread = threading.Thread(target=read)
        thread.start()
        while not any("were left out" in line["message"] for line in lines[-50:]):
            LOG.info("more")  # the loss is told as soon as there is room
            time.sleep(0.001)
    stream.close()
    thread.join()
    assert lines[0]["message"] == "line 0"
    assert sum("were left out" in line["message"] for line in lines) >= 1
