"""A short run of the strikes of benchmarks/server_chaos.py; a thousand and more are made by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/server_chaos.py"


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_server_and_workers_are_killed(tmp_path):
    cache = os.environ["FRAMELOOM_CACHE"]  # no kernel is compiled for this run alone
    words = [sys.executable, SCRIPT, "--moments", "8", "--seed", "8", "--keep", tmp_path, "--cache", cache]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert not told["broken"], done.stdout
    assert told["moments"] >= 8, told
    assert told["videos checked"] > 0, told
