"""The file of keys: what it may say, and that no secret is ever said again."""

import hashlib
import logging

import pytest

from frameloom.errors import RequestError
from frameloom.serve.keys import key_of_secret, read_keys

SECRET = "a-secret-of-alice-0123456789"
OTHER = "another-secret-of-bob-9876543"


@pytest.fixture
def file_of(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "keys.toml"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def test_names_secrets_and_what_each_may_have(file_of):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    alice_says = f'[alice]\nsecret = "{SECRET}"\nqueued = 3\npriority = 5\n'
    path = file_of(f'{alice_says}[bob]\nsecret_sha256 = "{digest.upper()}"\n')
    alice, bob = read_keys(path)
    assert (alice.name, alice.queued, alice.priority) == ("alice", 3, 5)
    assert alice.digest == hashlib.sha256(SECRET.encode()).digest()
    assert (bob.name, bob.queued, bob.priority) == ("bob", None, 0)
    assert bob.digest == hashlib.sha256(OTHER.encode()).digest()
    assert SECRET not in repr(alice)
    assert digest not in repr(bob).lower()


BAD = {
    "": ("has no keys", "secret"),
    f'[alice]\nsecret = "{SECRET}"\n[bob]\nsecret = "{SECRET}"': ("'alice' and 'bob'", "the same secret"),
    f'[alice]\nsecret = "{SECRET}"\nsecret_sha256 = "{"0" * 64}"': ("'alice'", "only one of them"),
    f'[alice]\nsecret = "{SECRET[:15]}"': ("'alice'", "16 or more"),
    f'[alice]\nsecret = "{SECRET} {SECRET}"': ("'alice'", "without spaces"),
    f'[alice]\nsecret_sha256 = "{SECRET}"': ("'alice'", "64 hexadecimal digits"),
    f'[alice]\nsecret = "{SECRET}"\nqueued = 0': ("queued", "'alice'", "from 1"),
    f'[alice]\nsecret = "{SECRET}"\nqueued = true': ("queued", "from 1"),
    f'[alice]\nsecret = "{SECRET}"\npriority = 1001': ("priority", "from 0 to 1000"),
    f'[alice]\nsecret = "{SECRET}"\nrole = "admin"': ("'role'", "unknown"),
    "[alice]\nsecret = 17": ("secret", "no text"),
    f'alice = "{SECRET}"': ("'alice'", "no table"),
    f'["a b"]\nsecret = "{SECRET}"': ("'a b'", "no name"),
    f'[alice\nsecret = "{SECRET}"': ("no TOML", "line 1"),
    f'[alice]\nsecret = "{SECRET}': ("no TOML",),
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_wrong_is_said_in_one_sentence_without_the_secret(file_of, text):
    with pytest.raises(RequestError) as refusal:
        read_keys(file_of(text))
    said = str(refusal.value)
    assert SECRET[:15] not in said
    assert "\n" not in said
    for words in BAD[text]:
        assert words in said


def test_a_file_that_others_may_read_is_told(file_of, caplog):
    with caplog.at_level(logging.WARNING, "frameloom"):
        read_keys(file_of(f'[alice]\nsecret = "{SECRET}"', mode=0o644))
    assert "chmod 600" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "frameloom"):
        read_keys(file_of(f'[alice]\nsecret = "{SECRET}"'))
    assert caplog.text == ""


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_keys(tmp_path / "nowhere.toml")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_keys(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    binary.chmod(0o600)
    with pytest.raises(RequestError, match="no UTF-8"):
        read_keys(binary)


def test_the_one_secret_of_the_environment():
    assert key_of_secret(SECRET).name == "default"
    with pytest.raises(RequestError, match="FRAMELOOM_API_KEY needs 16"):
        key_of_secret("short")
