"""The command under torchrun, on one node and on two: the file that `--gpus` writes, and one sentence when it fails."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from frameloom import shapes
from frameloom.settings import LOOPBACK

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ASKED = ["-m", "frameloom", "generate", "a red circle", "--device", "cpu", "--width", "48", "--height", "32"]
ASKED += ["--frames", "5", "--steps", "2", "--quiet"]
TIMEOUT_S = 200


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


def free_port() -> str:
    with socket.create_server((LOOPBACK, 0)) as probe:
        return str(probe.getsockname()[1])


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def of_our_launcher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the file that two ranks of `--gpus` write."""
    file = tmp_path_factory.mktemp("launcher") / "video.mp4"
    assert finish(start([sys.executable, *ASKED, "--gpus", "2", "--output", str(file)])) == [(0, "")]
    return digest(file)


def test_one_node_writes_the_same_file(of_our_launcher: str, tmp_path: Path) -> None:
    file = tmp_path / "video.mp4"
    ((code, words),) = finish(
        start([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *ASKED, "--output", str(file)])
    )
    assert code == 0, words
    assert digest(file) == of_our_launcher
    assert list(tmp_path.iterdir()) == [file]


MEETINGS = {  # how two agents find each other: torchrun's own options
    "static": lambda node, port: ["--node-rank", str(node), "--master-addr", LOOPBACK, "--master-port", port],
    "c10d": lambda node, port: ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "video"],
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_two_nodes_write_the_same_file(meeting: str, of_our_launcher: str, tmp_path: Path) -> None:
    port, folders = free_port(), [tmp_path / "0", tmp_path / "1"]
    agents = []
    for node, folder in enumerate(folders):
        folder.mkdir()
        nodes = ["--nnodes", "2", "--nproc-per-node", "1", *MEETINGS[meeting](node, port)]
        agents.append(start([*TORCHRUN, *nodes, *ASKED, "--output", str(folder / "video.mp4")]))
    ended = finish(*agents)
    assert [code for code, _ in ended] == [0, 0], ended
    (file,) = [file for folder in folders for file in folder.iterdir()]  # rank 0's, whichever node that is
    assert digest(file) == of_our_launcher


def test_ranks_with_different_models_all_say_so_and_fail(tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(shapes.PATH, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    port, agents = free_port(), []
    for node, model in enumerate((shapes.PATH, other)):
        nodes = ["--nnodes", "2", "--nproc-per-node", "1", *MEETINGS["static"](node, port)]
        agents.append(start([*TORCHRUN, *nodes, *ASKED, "--model", str(model), "--output", str(tmp_path / "v.mp4")]))
    for rank, (code, words) in enumerate(finish(*agents)):
        ours = [line for line in words.splitlines() if line.startswith("frameloom:")]
        assert code != 0
        assert len(ours) == 1
        assert ours[0].startswith(f"frameloom: rank {rank}: rank 1 has model ")
        assert ours[0].endswith("; give every rank the same model")
    assert not (tmp_path / "v.mp4").exists()
