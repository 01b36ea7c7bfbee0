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
from pathlib import Path
from typing import Any

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
    config = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)
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


def counts(found: dict[str, Any]) -> str:
    """How many passed, failed and were skipped."""
    told = list(found["outcomes"].values())
    return ", ".join(f"{told.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def main() -> None:
    """Run the tests both ways, and compare."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("checkout", type=Path, help="Diffusers' repository, of the release that is installed")
    asked.add_argument("-k", dest="chosen", default="", help="as pytest takes it")
    options = asked.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_text_encoder(Path(folder))
        both = [run_tests(options.checkout, Path(folder), is_plain=p, chosen=options.chosen) for p in (True, False)]
    plain, ours = both
    print(f"\nas they come: {counts(plain)}\naccelerated:  {counts(ours)}; {ours['taken']} components were taken")
    for name, outcome in ours["outcomes"].items():
        if outcome != plain["outcomes"].get(name):
            print(f"{name}: {plain['outcomes'].get(name)}, accelerated {outcome}: {ours['reasons'].get(name, '')}")


if __name__ == "__main__":
    main()
