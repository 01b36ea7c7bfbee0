"""A file that one process holds at a time."""

import os
import subprocess
import sys
from contextlib import closing

import pytest

from frameloom.lock import Lock, holder_of, is_held

HOLD = (
    "import pathlib, sys; from frameloom.lock import Lock\n"
    "lock = Lock(pathlib.Path(sys.argv[1])); print(flush=True); input()"
)


def test_nobody_else_can_hold_what_is_held_and_the_file_names_the_holder(tmp_path):
    path = tmp_path / "lock"
    with closing(Lock(path)) as lock:
        assert lock.before is None
        assert is_held(path)
        assert holder_of(path) == os.getpid()
        with pytest.raises(BlockingIOError):
            Lock(path)
    assert not is_held(path)


def test_a_killed_process_holds_nothing_and_is_known_to_the_next_one(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert is_held(path)
        other.kill()
        other.wait()
    assert not is_held(path)
    with closing(Lock(path)) as lock:
        assert lock.before == other.pid


def test_a_file_that_is_removed_is_free_for_a_new_one(tmp_path):
    path = tmp_path / "lock"
    Lock(path).remove()
    assert not path.exists()
    assert not is_held(path)
    with closing(Lock(path)):
        assert is_held(path)


def test_a_file_that_its_holder_removed_while_another_opened_it_is_not_held(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    opened, removals = os.open, [Lock(path).remove]

    def open_late(*arguments):
        number = opened(*arguments)
        while removals:
            removals.pop()()
        return number

    monkeypatch.setattr(os, "open", open_late)
    with closing(Lock(path)):
        assert is_held(path), "the new file, and not the one that is gone"


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_is_no_file_is_not_held(kind, tmp_path):
    path = tmp_path / "lock"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"directory|symbolic links"):
        Lock(path)
    assert not (tmp_path / "elsewhere").exists()
