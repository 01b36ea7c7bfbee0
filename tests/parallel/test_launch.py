"""Ranks that are started, watched and ended: whichever fails, all end soon, and the one that failed is named."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frameloom.errors import RequestError
from frameloom.parallel.launch import Outcome, count_ranks, run_ranks
from frameloom.settings import LOOPBACK, Launched, launched, rank_environment

# What every rank of these tests begins with. `place.rank` says who it is; all of them are found by their `mark`.
BEGIN = """
import os, signal, sys, time
from frameloom.parallel.heart import Ending, Heart
from frameloom.settings import launched

place = launched()
heart = Heart(place.heart_fd, tidies=place.rank == 0)
heart.start()

def end(**words):
    heart.tell(Ending(**words))
    os._exit(words["code"])

def terminate(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)

"""
LAUNCHER = """
import sys
from frameloom.parallel.launch import run_ranks
outcome = run_ranks([sys.executable, "-c", sys.argv[2], *sys.argv[3:]], int(sys.argv[1]), say=sys.stderr.write)
print(outcome.message)
sys.exit(outcome.code)
"""
WAIT = "\ntime.sleep(60)"


def run(count: int, program: str) -> tuple[Outcome, str]:
    said: list[str] = []
    return run_ranks([sys.executable, "-c", BEGIN + program], count, say=said.append), "".join(said)


def launch(count: int, program: str, *arguments: str) -> subprocess.Popen[str]:
    """A launcher in a process of its own."""
    command = [sys.executable, "-c", LAUNCHER, str(count), BEGIN + program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def soon(happens) -> bool:
    until = time.monotonic() + 20
    while not happens() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(happens())


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Path]:
    """A folder into which ranks write their process numbers."""
    yield tmp_path
    for note in tmp_path.glob("*.pid"):
        if alive([int(note.read_text())]):
            os.kill(int(note.read_text()), signal.SIGKILL)


NOTE = "open(os.path.join(sys.argv[1], f'{place.rank}.pid'), 'w').write(str(os.getpid()))\n"


def noted(folder: Path, count: int) -> list[int]:
    paths = [folder / f"{rank}.pid" for rank in range(count)]
    assert soon(lambda: all(path.exists() and path.read_text() for path in paths))
    return [int(path.read_text()) for path in paths]


# --- what a rank knows, and says ---


def test_each_rank_knows_its_place_and_all_end_well() -> None:
    outcome, said = run(3, "print(place, os.environ['OMP_NUM_THREADS'], file=sys.stderr)")
    assert outcome == Outcome(code=0)
    for rank in range(3):
        assert f"rank={rank}, world_size=3, local_rank={rank}, local_world_size=3, address='{LOOPBACK}'" in said
    assert said.count("store_fd=None") == 2  # rank 0 has the listening socket


def test_lines_of_other_ranks_are_marked_and_what_all_say_is_told_once() -> None:
    program = "print('all', file=sys.stderr, flush=True)\nprint('from', place.rank, file=sys.stderr)\ntime.sleep(0.2)"
    assert sorted(run(3, program)[1].splitlines()) == ["[rank 1] from 1", "[rank 2] from 2", "all", "from 0"]


def test_a_rank_that_ends_early_and_well_is_no_failure() -> None:
    assert run(2, "time.sleep(place.rank)")[0] == Outcome(code=0)


# --- ranks that fail ---


def test_a_killed_rank_is_named() -> None:
    outcome, _ = run(3, "if place.rank == 2: os.kill(os.getpid(), 9)" + WAIT)
    assert outcome.code == 1
    assert outcome.message.startswith("rank 2 was killed by SIGKILL")
    assert outcome.message.endswith("; the other ranks were ended")


def test_a_stopped_rank_is_named() -> None:
    outcome, _ = run(2, "if place.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)" + WAIT)
    assert outcome == Outcome(code=1, message="rank 1 was stopped (SIGSTOP); the other ranks were ended")


def test_a_rank_that_shows_no_life_is_named() -> None:
    # Blocked signals would not do: to be silent, a rank must not run Python at all while it waits.
    program = "import ctypes\nif place.rank == 1: ctypes.PyDLL(None).sleep(60)" + WAIT
    outcome, _ = run(2, program)
    assert outcome == Outcome(code=1, message="rank 1 gave no sign of life for 3 s; the other ranks were ended")


def test_the_sentence_of_a_rank_and_its_exit_code_are_those_of_the_run() -> None:
    outcome, _ = run(2, "if place.rank == 1: end(code=2, message='there is not enough memory')" + WAIT)
    assert outcome == Outcome(code=2, message="rank 1: there is not enough memory")


def test_what_every_rank_says_is_said_once() -> None:
    assert run(3, "end(code=2, message='no such model')")[0] == Outcome(code=2, message="no such model")


def test_a_verdict_without_words_is_an_exit_code() -> None:
    assert run(2, "end(code=1)") == (Outcome(code=1), "")


def test_the_traceback_of_a_rank_is_told_and_that_of_those_who_lost_it_is_not() -> None:
    program = """
if place.rank == 1:
    time.sleep(0.5)  # after those who lost it
    end(code=1, message="failed with ValueError: odd", trace="Traceback:\\nValueError: odd")
end(code=1, message="lost", trace="of no interest", lost=True)
"""
    outcome, said = run(3, program)
    assert outcome == Outcome(code=1, message="rank 1: failed with ValueError: odd")
    assert said == "[rank 1] Traceback:\n[rank 1] ValueError: odd\n"


def test_a_rank_that_failed_to_begin_is_named_and_its_error_told() -> None:
    said: list[str] = []
    command = [sys.executable, "-c", "import os, sys; sys.exit('no way' if os.environ['RANK'] == '1' else 0)"]
    outcome = run_ranks(command, 2, say=said.append)
    assert outcome == Outcome(code=1, message="rank 1 ended with exit code 1; the other ranks were ended")
    assert said == ["[rank 1] no way\n"]


def test_rank_0_may_tidy_up_when_another_fails_even_if_it_waits_for_that_one(tmp_path: Path) -> None:
    """Rank 0 waits for rank 1 outside of Python, as in an exchange, and holds a partial file."""
    partial = tmp_path / "partial"
    program = f"""
import socket
ours, theirs = {str(tmp_path / "socket")!r}, {str(partial)!r}
if place.rank == 0:
    door = socket.socket(socket.AF_UNIX)
    door.bind(ours); door.listen()
    peer = door.accept()[0]
    open(theirs, "w").close()
    signal.signal(signal.SIGTERM, terminate)
    try:
        peer.send(b"!"); peer.recv(1)
        raise ConnectionError("closed by peer")
    finally:
        os.remove(theirs)
if place.rank == 1:
    while not os.path.exists(ours): time.sleep(0.01)
    peer = socket.socket(socket.AF_UNIX); time.sleep(0.1); peer.connect(ours); peer.recv(1)
    time.sleep(60)
while not os.path.exists(theirs): time.sleep(0.01)
end(code=1, message="odd")
"""
    outcome, _ = run(3, program)
    assert outcome == Outcome(code=1, message="rank 2: odd")
    assert not partial.exists()


# --- launchers that end ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_rank_outlives_its_launcher(number: signal.Signals, notes: Path) -> None:
    """Rank 1 is stopped, rank 2 hangs outside of Python and has a child."""
    program = NOTE + (
        "import ctypes, subprocess\n"
        "if place.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "if place.rank == 2:\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    open(os.path.join(sys.argv[1], '3.pid'), 'w').write(str(child.pid))\n"
        "while True: time.sleep(60)"
    )
    launcher = launch(3, program, str(notes))
    pids = noted(notes, 4)
    launcher.send_signal(number)
    launcher.communicate(timeout=120)
    assert launcher.returncode == -number
    assert soon(lambda: not alive(pids[:3]))
    # Rank 2 had no time to end what it had started where the kernel ended it; the launcher's group kill has.
    if number == signal.SIGINT:
        assert not alive(pids)


def test_a_pause_of_everything_ends_no_rank(notes: Path) -> None:
    """As a container is paused: the launcher goes on first, and must not take what it slept through for silence."""
    launcher = launch(2, NOTE + "time.sleep(9)", str(notes))
    pids = noted(notes, 2)
    everything = [launcher.pid, *pids]
    for pid in everything:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4.5)  # longer than a rank may be silent
    for pid in everything:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)
    out, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, out, err) == (0, "\n", "")


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_rank_0_tidies_up_when_the_launcher_is_killed(stopped: bool, notes: Path) -> None:
    program = NOTE + (
        "partial = os.path.join(sys.argv[1], 'partial')\n"
        "signal.signal(signal.SIGTERM, terminate)\n"
        "open(partial, 'w').close()\n"
        "try: time.sleep(60)\n"
        "finally: os.path.exists(partial) and os.remove(partial)"
    )
    launcher = launch(1, program, str(notes))
    pids = noted(notes, 1)
    assert soon((notes / "partial").exists)
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    launcher.kill()
    launcher.communicate(timeout=120)
    assert soon(lambda: not alive(pids))
    assert not (notes / "partial").exists()


# --- what is asked for ---


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(RequestError, match=r"port \d+ \(MASTER_PORT\) cannot be used \(Address already in use\)"):
            run_ranks([sys.executable, "-c", ""], 2, say=print)


def place_of(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> Launched | None:
    environment = rank_environment(1, 4, port=29500, heart_fd=7, store_fd=None)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, environment[name])
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    return launched()


def test_torchruns_variables_say_a_ranks_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    assert place_of(monkeypatch, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="2") == Launched(
        rank=1,
        world_size=4,
        local_rank=1,
        local_world_size=4,
        address=LOOPBACK,
        port=29500,
        agent_store=True,
        attempt=2,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "4"}, "RANK is '4', where a whole number from 0 to 3 belongs; start with --gpus or torchrun"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four'"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE is '8', where a whole number from 1 to 4 belongs"),
        ({"LOCAL_RANK": None, "MASTER_PORT": None}, "RANK is set and LOCAL_RANK, MASTER_PORT not"),
    ],
)
def test_variables_that_make_no_sense_are_told(monkeypatch: pytest.MonkeyPatch, changes, words: str) -> None:
    with pytest.raises(RequestError) as error:
        place_of(monkeypatch, **changes)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("gpus", "plan", "started", "words"),
    [
        (0, "auto", 0, "--gpus 0 is not possible; use a whole number from 1 to 64"),
        (-1, "auto", 0, "--gpus -1 is not possible"),
        (65, "auto", 0, "--gpus 65 is not possible"),
        (None, "ulysses=100", 0, "100 ranks on one machine are not possible; start them with torchrun"),
        (2, "auto", 4, "--gpus 2 contradicts the 4 ranks that were started; leave it away"),
        (2, "ulysses=4", 0, "ulysses=4 takes 4 ranks, and there are 2"),
    ],
)
def test_counts_that_are_not_possible_are_told(gpus, plan: str, started: int, words: str) -> None:
    place = Launched(
        rank=0, world_size=started, local_rank=0, local_world_size=started, address=LOOPBACK, port=1
    ) if started else None  # fmt: skip
    with pytest.raises(RequestError) as error:
        count_ranks(gpus, plan, place)
    assert str(error.value).startswith(words)


def test_the_count_is_that_of_the_gpus_or_of_the_plan() -> None:
    assert count_ranks(None, "auto", None) == 1
    assert count_ranks(4, "auto", None) == 4
    assert count_ranks(None, "cfg=2,ring=3", None) == 6
