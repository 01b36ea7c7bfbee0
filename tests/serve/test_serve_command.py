"""`frameloom serve` as people start and end it: real processes, real sockets, real signals."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from frameloom.serve.check import Finding, check
from frameloom.serve.config import ServeConfig

SECRET = "a-secret-of-alice-0123456789"


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(f'[alice]\nsecret = "{SECRET}"\n')
    path.chmod(0o600)
    return path


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "frameloom", "serve", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


# --- at the door ---


def test_help_and_errors_at_the_door_load_neither_torch_nor_the_server():
    code = """
import sys
from frameloom.cli import main
sys.argv = ["frameloom", "serve", *sys.argv[1:]]
try:
    main()
finally:
    print([name for name in ("torch", "fastapi", "uvicorn", "msgspec") if name in sys.modules])
"""
    for arguments in (["--help"], ["--port", "99999"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


BAD = {
    ("--data-dir", ""): "--data-dir is empty",
    ("--port", "70000"): "--port 70000 is not possible; use a whole number from 0 to 65535",
    ("--workers", "0"): "--workers 0",
    ("--batch", "0"): "--batch 0",
    ("--gpus-per-worker", "1000"): "--gpus-per-worker 1000",
    ("--max-queue", "0"): "--max-queue 0",
    ("--max-queue-seconds", "nan"): "--max-queue-seconds nan",
    ("--max-queue-per-key", "-1"): "--max-queue-per-key -1",
    ("--ttl", "soon"): "a time of 'soon'",
    ("--deadline", "0"): "a time of '0'",
    ("--grace", "1w"): "a time of '1w'",
    ("--quota", "much"): "a memory of 'much'",
    ("--memory", "-3GB"): "a memory of '-3GB'",
    ("--residence", "vae=moved"): "residence 'vae=moved'",
    ("--parallel", "ulysses=2"): "ulysses=2 takes 2 ranks, and there are 1",
    ("--name", "a b"): "name 'a b'",
    ("--model", "nowhere"): "--model 'nowhere' is neither a file or folder that is there nor owner/name of the hub",
    ("--model", ""): "--model '' is neither",
    ("--text-encoder", "/nowhere/umt5.gguf"): "--text-encoder '/nowhere/umt5.gguf' is neither",
    ("--log", "xml"): "log 'xml' is unknown",
    ("--lora", "style.safetensors"): "has no name",
    ("--lora", "style=/nowhere/style.safetensors"): "there is no file '/nowhere/style.safetensors'",
    ("--lora", "a/b=x"): "has no name",
    ("--allow-url", "http://example.com/"): "host 'http://example.com/' is no name",
    ("--keys", "/nowhere/keys.toml"): "keys file '/nowhere/keys.toml' cannot be read",
    ("--host", "no.such.host.invalid"): "host 'no.such.host.invalid' has no address",
    ("--host", "192.0.2.1", "--insecure-public"): "is no address of this machine",
    ("--host", "0.0.0.0"): "0.0.0.0 can be reached by others, and without keys anybody may ask",
    ("--host", "::"): "can be reached by others",
    ("--colour",): "No such option",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_what_cannot_be_is_one_sentence_and_exit_code_2(run, tmp_path, arguments):
    code, out, err = run("serve", "--data-dir", tmp_path / "data", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("frameloom: ")
    assert len(err.splitlines()) == 1, err
    assert BAD[arguments] in err
    assert not (tmp_path / "data").exists()


def test_a_taken_port_is_said_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("--port", port, "--data-dir", tmp_path / "data")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"127.0.0.1 port {port} is taken by another process; choose another --port" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_libraries_of_the_extra_it_says_what_to_install(tmp_path):
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastapi", "uvicorn", "msgspec", "starlette", "prometheus_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from frameloom.cli import main
sys.argv = ["frameloom", "serve", "--port", "0", "--data-dir", sys.argv[1]]
main()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "data"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "which is not installed; pip install 'frameloom[serve]'" in done.stderr


def test_every_option_that_the_documentation_names_exists(run):
    documented = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?(--[a-z][a-z-]+)", re.sub(r"curl[^\n]*|openssl[^\n]*", "", documented)))
    _, help_text, _ = run("serve", "--help")
    assert len(named) > 15
    assert sorted(option for option in named if option not in help_text) == []


# --- --check ---


def rows(text):
    """What a table of --check says: by its parts, whether all is well, and what was found."""
    found, part = {}, ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃").split("│")]
        if len(cells) == 3:
            part = cells[0] or part
            well, what = found.get(part, ("", ""))
            found[part] = (well or cells[1], f"{what} {cells[2]}".strip())
    return found


def test_check_finds_all_well_and_leaves_nothing_behind(tmp_path, keys_file):
    done = command("--check", "--port", "0", "--data-dir", tmp_path / "a" / "data", "--keys", keys_file)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(done.stdout)
    assert {part: well for part, (well, _) in found.items()} == dict.fromkeys(
        ("keys", "address", "data folder", "free space", "job store", "model", "devices"), "ok"
    )
    assert "alice" in found["keys"][1]
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "a").exists()


def test_check_takes_the_store_of_a_first_start_that_was_cut_short_as_a_start_does(tmp_path):
    def store():
        (tmp_path / "jobs.sqlite").write_bytes(b"")
        return next(finding for finding in check(ServeConfig(data=tmp_path, port=0)) if finding.part == "job store")

    assert store() == Finding(part="job store", is_well=True, what="whole: 0 jobs wait, 0 have ended")
    (tmp_path / "videos" / f"video_{1:032x}").mkdir(parents=True)
    assert not store().is_well


def test_check_finds_what_is_wrong(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "jobs.sqlite").write_bytes(os.urandom(8192))
    broken = tmp_path / "model"
    broken.mkdir()
    lora = tmp_path / "style.safetensors"
    lora.write_bytes(b"no weights")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command(
            "--check", "--port", taken.getsockname()[1], "--data-dir", data, "--model", broken, "--device", "quantum",
            "--lora", f"style={lora}", "--reserve", "900000GB", "--host", "127.0.0.1",
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows(done.stdout)
    fails = {part for part, (well, _) in found.items() if well == "fails"}
    assert fails == {"address", "free space", "job store", "model", "devices", "LoRA style"}, done.stdout
    assert "'quantum' is unknown" in found["devices"][1]
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in data.iterdir()] == ["jobs.sqlite"]
