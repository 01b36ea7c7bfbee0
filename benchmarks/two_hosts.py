"""Two hosts that are network namespaces of this machine, joined by a cable (veth), make one video with torchrun.

`python benchmarks/two_hosts.py [--rate 100mbit] [--delay 1ms]`: exit code 1 unless both end well and the file is
the one of two ranks on one host. Needs Linux, root and `ip` (`apt install iproute2`); `tc` of the same package slows
the cable, a delay where the kernel has netem. What it makes has names of its own, and is removed whatever happens.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PATIENCE_S = 300.0
GRACE_S = 40.0  # torchrun gives its ranks 30
PORT = 29500  # nobody else is in a namespace that was just made
FAST = ["generate", "a red circle moving left", "--device", "cpu", "--no-journal", "--quiet"]


def run(*command: str) -> str:
    """What a command of the system prints. Exits with the kernel's words where it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts(rate: str | None, delay: str | None) -> Iterator[dict[str, str]]:
    """The names of two namespaces and the address of each, joined by a cable that may be slow."""
    names = [f"frameloom{os.getpid()}{end}" for end in "ab"]
    hosts = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in hosts.items():
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "cable", "up")
            if shape := _shape(rate, delay):
                run("tc", "-n", name, "qdisc", "add", "dev", "cable", "root", *shape)
        yield hosts
    finally:
        for name in names:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _shape(rate: str | None, delay: str | None) -> list[str]:
    """How `tc` slows a cable: by a bucket of tokens, which every kernel has, or with a delay by netem."""
    if delay is not None:
        return ["netem", "delay", delay, *(["rate", rate] if rate is not None else [])]
    return [] if rate is None else ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]


def sent_bytes(name: str) -> int:
    """What left a host through the cable."""
    return int(run("ip", "netns", "exec", name, "cat", "/sys/class/net/cable/statistics/tx_bytes"))


def start_nodes(hosts: dict[str, str], output: Path, options: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """One torchrun on each host; the first is where they meet."""
    nodes = []
    for number, name in enumerate(hosts):
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--node-rank", str(number), "--master-addr", hosts[next(iter(hosts))], "--master-port", str(PORT),
        ]  # fmt: skip
        command = ["ip", "netns", "exec", name, *torchrun, "-m", "frameloom", *FAST, *options, "--output", str(output)]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, env=environment))
    return nodes


def wait_for(nodes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes; whoever has not ended in time is ended with all that it started."""
    until = time.monotonic() + PATIENCE_S
    try:
        return [node.wait(timeout=max(0.1, until - time.monotonic())) for node in nodes]
    except subprocess.TimeoutExpired:
        sys.exit(f"the hosts had not ended after {PATIENCE_S:.0f} s")
    finally:
        for node in nodes:
            node.terminate()  # torchrun ends its ranks
        for node in nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(timeout=GRACE_S)
            node.kill()
            node.wait()


def on_one_host(output: Path, options: Sequence[str]) -> float:
    """The same video by two ranks of this machine; the seconds it takes."""
    command = [sys.executable, "-m", "frameloom", *FAST, "--gpus", "2", *options, "--output", str(output)]
    begun = time.monotonic()
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=PATIENCE_S)
    return time.monotonic() - begun


def main() -> None:
    """Make the video twice, print what was found, and exit with 1 if the files differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the cable, as tc writes it: 100mbit, 10gbit")
    parser.add_argument("--delay", help="of the cable, each way: 1ms")
    parser.add_argument("--steps", default="4")
    parser.add_argument("--parallel", default="auto")
    asked = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        sys.exit("this needs Linux, root and `ip` (apt install iproute2)")
    options = ["--steps", asked.steps, "--parallel", asked.parallel]
    with tempfile.TemporaryDirectory() as folder:
        alone, together = Path(folder) / "one_host.mp4", Path(folder) / "two_hosts.mp4"
        print(f"one host, two ranks: {on_one_host(alone, options):.1f} s", flush=True)
        with two_hosts(asked.rate, asked.delay) as hosts:
            begun = time.monotonic()
            codes = wait_for(start_nodes(hosts, together, options))
            print(f"two hosts {' and '.join(hosts.values())}: {time.monotonic() - begun:.1f} s, exit codes {codes}")
            print("sent through the cable: " + ", ".join(f"{sent_bytes(name):,} bytes" for name in hosts))
        if any(codes):
            sys.exit(1)
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (alone, together)]
        print(f"sha256 of one host {digests[0][:16]}, of two hosts {digests[1][:16]}")
        sys.exit(0 if digests[0] == digests[1] else "the files differ")


if __name__ == "__main__":
    main()
