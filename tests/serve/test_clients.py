"""The official `openai` client, unmodified, against a real server; older ones: benchmarks/server_clients.py."""

import json
import os
import sys

import pytest
import server_clients

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the client says of every step."""
    folder, cache = tmp_path_factory.mktemp("served"), os.environ["FRAMELOOM_CACHE"]
    with server_clients.servers(folder, cache) as (text, image, picture):
        words = [sys.executable, "-W", "ignore::DeprecationWarning", str(server_clients.HERE / "scenario.py")]
        yield server_clients.run(words, text, image, picture, [])


@pytest.mark.slow
def test_every_step_of_the_scenario_goes_well(told):
    assert len(told) > 20, told
    assert not server_clients.wrong(told), json.dumps(told, indent=1)
