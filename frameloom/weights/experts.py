"""Tells the two noise experts of Wan 2.2 apart by the names of their files, and finds the other one of a pair.

The only thing that names decide: the tensors of both are alike. Pure; torch-free.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from frameloom.errors import CheckpointError
from frameloom.weights.hub_choice import is_weights

# As a word of its own (HIGH, _low_), or with "noise" behind it: not "low" in "flow" nor "high" in "highres".
_NOISE = re.compile(
    r"(?<![A-Za-z])(?:high|low|High|Low|HIGH|LOW)(?=[-_ .]?(?i:noise)|(?![A-Za-z]))|(?:High|Low)(?=Noise)"
)
# What two files of a pair may differ in besides: a version (v1.1, 250928), and how their numbers are stored.
_VERSION = re.compile(r"(?<![a-z0-9])(?:v\d+(?:[._]\d+)*|\d{6}|\d{8})(?![a-z0-9])")
_STORED = re.compile(
    r"(?<![a-z0-9])(?:i?q\d(?:_(?:[01k]|nl))?(?:_(?:xxs|xs|xl|[sml]))?|tq\d_0|bf16|fp?(?:8|16|32)"
    r"|e4m3(?:fn|fnuz)?|e5m2(?:fnuz)?|scaled|int[48]|nvfp4|mxfp[48])(?![a-z0-9])"
)
_BETWEEN = re.compile(r"(?:noise|[-_. ])+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """Which noise expert a file is by its name, or by its folder's. `expected`: what the other one would be called.

    `others`: those that its name fits: none, the other one, or several that fit alike. `differs`: in what its name is
    another besides high and low, such as "version"; "" where in nothing.
    """

    is_high: bool
    expected: Path
    others: tuple[Path, ...] = ()
    differs: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Name:
    """The name of a file without the words of noise, in its parts."""

    model: str
    version: tuple[str, ...]
    stored: tuple[str, ...]


def is_high(path: Path) -> bool | None:
    """Whether a file is for high noise, by its name, or else by its folder's; None where it is not said."""
    for part in (path.name, path.parent.name):
        if words := {match[0].lower() for match in _NOISE.finditer(part)}:
            return words == {"high"} if len(words) == 1 else None
    return None


def pair_of(path: Path, near: Iterable[Path]) -> Expert | None:
    """Which expert a file is, and among the files `near` it the other one; None where its name does not say.

    First the one whose name, or whose folder, has the words exchanged; else the one of the same model whose name
    differs least in version and in how it is stored.
    """
    high = is_high(path)
    if high is None:
        return None
    expected = _exchanged(path)
    present = sorted(other for other in near if other != path)
    if same := next((other for other in expected if other in present), None):
        return Expert(is_high=high, expected=expected[0], others=(same,))
    fitting = [other for other in present if is_high(other) is (not high) and _is_beside(other, path)]
    ranked = [(differs, other) for other in fitting if (differs := _differences(path, other)) is not None]
    least = min((differs for differs, _ in ranked), key=len, default=[])
    others = tuple(other for differs, other in ranked if len(differs) == len(least))
    return Expert(is_high=high, expected=expected[0], others=others, differs=" and ".join(least))


def the_other(pair: Expert, path: Path) -> Path | None:
    """The file of the other expert, None where there is none. Raises CheckpointError where several fit alike."""
    if len(pair.others) < 2:
        return next(iter(pair.others), None)
    names = ", ".join(other.name for other in pair.others)
    give = "it with --transformer-2" if pair.is_high else "it with --transformer, this one with --transformer-2"
    raise CheckpointError(
        f"'{path}' is one of two noise experts, and the other may be any of {names}; choose, and give {give}"
    )


def files_near(path: Path) -> Iterator[Path]:
    """The files in the folder of a file, and in the one beside it that has high for low in its name."""
    for folder in {path.parent, _exchanged(path)[0].parent}:
        if folder.is_dir():
            yield from (file for file in folder.iterdir() if file.is_file())


def _exchanged(path: Path) -> list[Path]:
    """A path with high for low and low for high: in name and folder, or in one of them."""
    folder, name = (_NOISE.sub(_other_word, part) for part in (path.parent.name, path.name))
    paths = [path.parent.parent / folder / name, path.with_name(name), path.parent.parent / folder / path.name]
    return [other for other in paths if other != path]


def _other_word(match: re.Match[str]) -> str:
    word = match[0]
    other = {"high": "low", "low": "high"}[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _is_beside(other: Path, path: Path) -> bool:
    return is_weights(other.name.lower()) and other.parent in (path.parent, _exchanged(path)[0].parent)


def _differences(one: Path, other: Path) -> list[str] | None:
    """In what two names differ besides high and low; None for those of two models."""
    a, b = _name(one), _name(other)
    if a.model != b.model:
        return None
    return [
        *(["version"] if a.version != b.version else []),
        *(["quantization"] if a.stored != b.stored else []),
    ]


def _name(path: Path) -> _Name:
    bare = _NOISE.sub(" ", path.stem).lower()
    return _Name(
        model=_BETWEEN.sub(" ", _STORED.sub("", _VERSION.sub("", bare))).strip(),
        version=tuple(_VERSION.findall(bare)),
        stored=(*_STORED.findall(_VERSION.sub("", bare)), path.suffix.lower()),
    )
