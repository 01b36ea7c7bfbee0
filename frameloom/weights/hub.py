"""The model hub: fetches a repository's files, or looks at the headers of its weight files without fetching them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from frameloom.errors import CheckpointError
from frameloom.weights.header import TensorEntry, tensor_entries


def download(name: str, patterns: list[str], *, hint: str = "") -> Path:
    """Fetch the files of a repository that match `patterns`; the folder they are in is named after the commit.

    Files fetched before are not fetched again, and suffice when the hub cannot be reached. `hint` goes into the message
    if the name is wrong. Raises CheckpointError.
    """
    with _explained(name, hint):
        return Path(snapshot_download(name, allow_patterns=patterns))


class RemoteFiles:
    """The weight files of a repository, looked at where they are. Methods raise CheckpointError."""

    def __init__(self, name: str, *, commit: str) -> None:
        self._name, self._commit = name, commit
        with _explained(name):
            self._paths = HfApi().list_repo_files(name, revision=commit)

    def names(self, component: str) -> list[str]:
        """Names of the files in one component's folder, sorted."""
        paths = map(PurePosixPath, self._paths)
        return sorted(path.name for path in paths if str(path.parent) == component)

    def header(self, path: Path) -> dict[str, TensorEntry]:
        """The tensors of one weight file, by a request for the beginning of the file alone."""
        with _explained(self._name):
            found = HfApi().parse_safetensors_file_metadata(
                self._name, f"{path.parent.name}/{path.name}", revision=self._commit
            )
        entries = {key: asdict(info) for key, info in found.tensors.items()}
        return tensor_entries(path, entries, start=0)


@contextmanager
def _explained(name: str, hint: str = "") -> Iterator[None]:
    """Whatever goes wrong on the way to the hub becomes one sentence."""
    try:
        yield
        return
    except GatedRepoError:
        problem = "asks for its licence to be accepted; accept it on its page, then log in with 'hf auth login'"
    except (RepositoryNotFoundError, HFValidationError):
        problem = f"is no local folder and no public hub repository{hint}; check the name, or log in if private"
    except Exception as error:  # hub, OS and HTTP library each raise their own kinds: all mean "no files"
        kind = type(error).__name__
        problem = f"cannot be downloaded ({kind}){hint}; check the network, or give a local folder"
    raise CheckpointError(f"'{name}' {problem}") from None
