"""Diffusers' own fast tests of Wan's VAE, transformer and pipelines, with accelerated components.

    git clone --branch v0.40.0 https://github.com/huggingface/diffusers
    pip install diffusers==0.40.0 pytest peft accelerate
    python benchmarks/drop_in_diffusers_tests.py diffusers

Every VAE, transformer and pipeline of Wan that a test builds is accelerated as soon as it is built or read. The tests
run twice, as they come and accelerated; what fails only accelerated is listed. Nothing is fetched: the tiny text
encoder that the tests ask the hub for stands in a cache of its own, random as theirs.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from records import keep

T5 = "hf-internal-testing/tiny-random-t5"
FILES = (
    "tests/models/autoencoders/test_models_autoencoder_wan.py",
    "tests/models/transformers/test_models_transformer_wan.py",
    "tests/pipelines/wan",
)
REPORT = "DROP_IN_REPORT"  # where the plugin tells: a file; "plain" before it leaves all as it comes


class Plugin:
    """Accelerates what tests build, and tells what became of each."""

    def __init__(self, report: Path, *, is_plain: bool) -> None:
        self.report, self.is_plain = report, is_plain
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.taken = 0

    def pytest_configure(self) -> None:
        """Before Diffusers' tests are imported."""
        if not self.is_plain:
            for kind, name in _kinds():
                self._accelerate_what_is_built(kind, name)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's outcome: the worst of its setup, its call and its teardown."""
        if report.failed or report.skipped or report.when == "call":
            told = "failed" if report.failed else "skipped" if report.skipped else "passed"
            if self.outcomes.get(report.nodeid) != "failed":
                self.outcomes[report.nodeid] = told
            if report.failed:
                self.reasons[report.nodeid] = str(report.longrepr).strip().splitlines()[-1]
            if report.skipped:
                self.reasons[report.nodeid] = _why_skipped(report)

    def pytest_sessionfinish(self) -> None:
        """Write what was found."""
        told = {"outcomes": self.outcomes, "reasons": self.reasons, "taken": self.taken}
        self.report.write_text(json.dumps(told), encoding="utf-8")

    def _accelerate_what_is_built(self, kind: Any, name: str | None) -> None:
        plain_init, plain_read = kind.__init__, kind.from_pretrained.__func__

        @functools.wraps(plain_init)
        def init(made: Any, *args: Any, **kwargs: Any) -> None:
            plain_init(made, *args, **kwargs)
            if type(made) is kind:
                self._take(made, name)

        @functools.wraps(plain_read)
        def read(cls: Any, *args: Any, **kwargs: Any) -> Any:
            made = plain_read(cls, *args, **kwargs)
            self._take(made[0] if isinstance(made, tuple) else made, name)
            return made

        kind.__init__, kind.from_pretrained = init, classmethod(read)

    def _take(self, made: Any, name: str | None) -> None:
        import frameloom  # here: this file is also the program that starts the tests, and needs none of it

        try:
            report = frameloom.accelerate(made if name is None else {name: made})
        except frameloom.RequestError:
            return  # as a pipeline without a transformer
        self.taken += len(report.taken)


def _why_skipped(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return f"expected to fail: {report.wasxfail}" if hasattr(report, "wasxfail") else str(report.longrepr)


def _kinds() -> list[tuple[Any, str | None]]:
    import diffusers

    names = [name for name in dir(diffusers) if name.startswith("Wan") and name.endswith("Pipeline")]
    pipes = [(getattr(diffusers, name), None) for name in names]
    dits = [getattr(diffusers, f"Wan{name}Transformer3DModel", None) for name in ("", "VACE", "Animate")]
    return [*pipes, (diffusers.AutoencoderKLWan, "vae"), *((dit, "transformer") for dit in dits if dit)]


def save_text_encoder(cache: Path) -> None:
    """Put a tiny random T5 and a tokenizer where the hub's cache keeps what the tests ask for."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    repository = cache / "hub" / f"models--{T5.replace('/', '--')}"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(character, -3.0) for character in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"]
    # The tests build an encoder of this configuration at random, and compare with what its pipeline made. At a scale as
    # small as this it says nearly the same of all tokens: those of another tokenizer lead to the same numbers.
    shape = {"vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
    config = T5Config(**shape, relative_attention_num_buckets=8, initializer_factor=0.002)
    T5EncoderModel(config).save_pretrained(repository / "snapshots" / commit)
    T5Tokenizer(vocab=pieces, extra_ids=100).save_pretrained(repository / "snapshots" / commit)


def run_tests(checkout: Path, cache: Path, *, is_plain: bool, chosen: str) -> dict[str, Any]:
    """The tests in a process of their own."""
    report = cache / f"report-{is_plain}.json"
    told = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", REPORT: f"{'plain' if is_plain else 'ours'}:{report}"}
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-p", "no:cacheprovider", *FILES]
    if chosen:
        command += ["-k", chosen]
    subprocess.run(command, cwd=checkout, env={**os.environ, **told, "PYTHONPATH": paths}, check=False)
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def pytest_configure(config: Any) -> None:
    """As a plugin of pytest this file accelerates what tests build."""
    if REPORT in os.environ:
        kind, _, path = os.environ[REPORT].partition(":")
        plugin = Plugin(Path(path), is_plain=kind == "plain")
        config.pluginmanager.register(plugin)


def counts(found: dict[str, Any]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    told = Counter(found["outcomes"].values())
    return {kind: told[kind] for kind in ("passed", "failed", "skipped")}


def record(plain: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """What is kept of both runs."""
    import torch  # here, as above

    from frameloom.bench.paired import machine

    names = ours["outcomes"]
    return {
        "as they come": counts(plain),
        "accelerated": counts(ours),
        "components taken": ours["taken"],
        "end otherwise accelerated": _reasons(ours, (n for n in names if names[n] != plain["outcomes"].get(n))),
        "fail as they come": _reasons(plain, (n for n, told in plain["outcomes"].items() if told == "failed")),
        "skipped, and why": Counter(ours["reasons"][n] for n, told in names.items() if told == "skipped"),
        "machine": machine(torch.device("cpu")),
    }


def _reasons(found: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    return {name: f"{found['outcomes'][name]}: {found['reasons'].get(name, '')}" for name in names}


def main() -> None:
    """Run the tests both ways, and compare."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("checkout", type=Path, help="Diffusers' repository, of the release that is installed")
    asked.add_argument("-k", dest="chosen", default="", help="as pytest takes it")
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(Path(folder))
        ways = (functools.partial(run_tests, options.checkout, Path(folder), is_plain=plain) for plain in (True, False))
        with ThreadPoolExecutor() as pool:  # at once, each in a process of its own
            both = list(pool.map(lambda way: way(chosen=options.chosen), ways))
    found = record(*both)
    print(json.dumps(found, indent=1))
    if not options.chosen:
        keep({f"Diffusers {metadata.version('diffusers')}": found}, "drop-in-diffusers-tests")


if __name__ == "__main__":
    main()
