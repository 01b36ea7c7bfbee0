"""Fixtures of the whole suite: small checkpoints, written once."""

import logging
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels run without a GPU
# Else MKL's sums depend, on some processors, on where tensors begin, and the reference's weights begin elsewhere.
os.environ.setdefault("MKL_CBWR", "AUTO")

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging
from checkpoints import Kind, save_checkpoint
from safetensors.torch import load_file, save_file

import frameloom
from frameloom import cli

# Who starts the suite in the background, or under nohup, hands down that these are ignored; what a test starts, and
# ends by them, would ignore them, too.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, then those with most tests: no process is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    count = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -count[item.path], item.path))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory):
    """Compiled kernels, measured choices and jobs of this run alone, in processes that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FRAMELOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FRAMELOOM_JOBS", str(tmp_path_factory.mktemp("jobs")))
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the command in this process; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["frameloom", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    yield call
    logger = logging.getLogger("frameloom")  # as the command set it up for a process of its own
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a small random checkpoint of a kind; do not write into it."""
    made: dict[str, Path] = {}

    def make(kind: Kind = "one expert") -> Path:
        if kind not in made:
            made[kind] = save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", kind)
        return made[kind]

    return make


@pytest.fixture(scope="module")
def engine_of(checkpoint_of):
    """An engine on the CPU, in float32, for a checkpoint of a kind; one for all tests of a file."""
    opened = {}

    def load(kind, exactness="rounding"):
        key = kind, exactness
        if key not in opened:
            opened[key] = frameloom.load(checkpoint_of(kind), device="cpu", dtype="float32", exactness=exactness)
        return opened[key]

    yield load
    for engine in opened.values():
        engine.close()


@pytest.fixture(scope="session")
def float8_checkpoint(checkpoint_of, tmp_path_factory):
    """A checkpoint whose matrices are float8, as those that are shared to save space; do not write into it."""
    folder = tmp_path_factory.mktemp("float8") / "model"
    shutil.copytree(checkpoint_of(), folder)
    for part in ("transformer", "text_encoder"):
        (path,) = (folder / part).glob("*.safetensors")
        state = load_file(path)
        narrow = {name for name, value in state.items() if value.dim() == 2 and ("block" in name or "shared" in name)}
        save_file({name: x.to(torch.float8_e4m3fn) if name in narrow else x for name, x in state.items()}, path)
    return folder
