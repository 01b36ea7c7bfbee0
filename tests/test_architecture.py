"""The house rules, read from the imports: which room may use which, who owns a library, and what never happens."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import frameloom

PACKAGE = Path(frameloom.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to its foundations: a room imports only from lines below its own.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("serve", "bench", "verify", "doctor", "shapes", "vae"),
    ("integrations",),
    ("engine",),
    ("weights", "parallel", "memory", "cache", "pipeline"),
    ("models", "sampling"),
    ("attention",),
    ("ops",),
    ("platform",),
    ("config", "lock", "parent", "request", "settings", "wire"),
    ("types", "errors"),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Libraries with one owner each: paths that may import them (prefixes of paths inside the package).
OWNERS = {
    "torch.distributed": ("parallel/",),
    "transformers": ("models/clip.py", "integrations/"),
    "tokenizers": ("models/tokenizer.py",),
    "triton": ("ops/", "attention/"),
    "diffusers": ("integrations/",),
    "pydantic": ("serve/",),
    "fastapi": ("serve/",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/",),
    "python_multipart": ("serve/",),
    "prometheus_client": ("serve/",),
    "sqlite3": ("serve/jobs/sqlite.py",),
    "msgspec": ("wire.py", "serve/"),
    "pickle": (),
    "av": ("pipeline/",),
    "typer": ("cli/",),
    "rich": ("cli/", "shapes/evaluate.py"),
    "huggingface_hub": ("weights/", "models/clip.py"),
}
TORCH_FREE = (
    "serve", "types", "config", "errors", "lock", "parent", "request", "settings", "wire", "cli", "__init__",
    "__main__",
)  # fmt: skip
# Files of other rooms that a torch-free process reads: where to write, what the built-in model knows, how ranks start.
TORCH_FREE_FILES = (
    "pipeline/target.py",
    "pipeline/media.py",
    "pipeline/examine.py",
    "pipeline/images.py",
    "shapes/advice.py",
    "shapes/world.py",
    "engine/jobs.py",
    "engine/worker/__init__.py",
    "engine/worker/__main__.py",
    "engine/worker/line.py",
    "engine/worker/log.py",
    "parallel/__init__.py",
    "parallel/heart.py",
    "parallel/launch.py",
)


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def violations(path: Path, text: str) -> list[str]:
    tree = ast.parse(text)
    checks = (
        _direction,
        _owners,
        _torch_free,
        _inner_imports,
        _globals,
        _foreign_assignment,
        _loose_loading,
        _environment,
    )
    return [f"{inside(path)}:{line}: {rule}" for check in checks for line, rule in check(path, tree)]


def _direction(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    here = room(path)
    for name, line in imports(tree):
        parts = name.split(".")
        if parts[0] != "frameloom" or here == "__init__" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        there = parts[1]
        if there != here and LEVEL[there] <= LEVEL[here] and there != "__init__":
            yield line, f"'{here}' may not import '{there}': only rooms below its own line"


def _owners(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for name, line in imports(tree):
        for library, owners in OWNERS.items():
            if (name == library or name.startswith(library + ".")) and not inside(path).startswith(owners):
                yield line, f"only {', '.join(owners)} may import {library}"


def _torch_free(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if room(path) in TORCH_FREE or inside(path) in TORCH_FREE_FILES:
        for name, line in imports(tree):
            if name.split(".")[0] == "torch":
                yield line, "this file must not need torch"


def _inner_imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for name, line in imports(function):
                if name.split(".")[0] == "frameloom":
                    yield line, "our own package imported inside a function hides a cycle"


def _globals(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno, "no global statements"
    for node in ast.iter_child_nodes(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Call):
            name = getattr(value.func, "id", "")
            if name in ("list", "dict", "set") and not value.args:
                yield node.lineno, "module state: an empty container at module level is there to be filled"
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.List | ast.Dict | ast.Set):
            empty = not (value.keys if isinstance(value, ast.Dict) else value.elts)
            names = [getattr(t, "id", "") for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
            if empty and "__all__" not in names:
                yield node.lineno, "module state: an empty container at module level is there to be filled"


def _foreign_assignment(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    imported = {name.split(".")[-1] for name, _ in imports(tree)} | {name.split(".")[0] for name, _ in imports(tree)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) in imported:
                yield node.lineno, "assigning onto an imported module or a foreign class"


def _loose_loading(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", "")
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if name == "load_state_dict" and keywords.get("strict") is False:
            yield node.lineno, "load_state_dict(strict=False) drops keys in silence"
        if (
            name == "load"
            and getattr(node.func.value, "id", "") == "torch"
            and keywords.get("weights_only") is not True
        ):
            yield node.lineno, "torch.load without weights_only=True runs what a file says"
        compiles = name == "compile" and getattr(node.func.value, "id", "") == "torch"
        if compiles and inside(path) != "engine/compiled.py" and room(path) not in ("shapes", "bench"):
            yield node.lineno, "torch.compile belongs to engine/compiled.py (to training, and to what we compare with)"


def _environment(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and inside(path) != "settings.py":
            yield node.lineno, "only settings.py reads the environment"


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_every_file_keeps_the_house_rules(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []
    assert room(path) in LEVEL or room(path) == "__init__", f"{inside(path)} stands in no room of the house"


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_every_file_opens_with_what_lives_there(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring, f"{inside(path)} needs a module docstring"


BROKEN = {
    "models/x.py": {
        "import frameloom.engine.build": "may not import",
        "from frameloom.parallel import mesh": "may not import",
        "import torch.distributed as dist": "only parallel/",
        "from transformers import AutoModel": "only models/clip.py",
        "def f():\n    from frameloom.ops import norm": "hides a cycle",
        "CACHE = {}": "module state",
        "CACHE: dict[str, int] = dict()": "module state",
        "def f():\n    global x\n    x = 1": "no global",
        "import torch\ntorch.backends = 1": "foreign class",
        "m.load_state_dict(x, strict=False)": "drops keys",
        "import torch\ntorch.load('x')": "weights_only",
        "import torch\ntorch.compile(f)": "torch.compile belongs",
    },
    "config.py": {"import torch": "must not need torch", "import frameloom.models.spec": "may not import"},
    "sampling/x.py": {"from frameloom.models import wan_dit": "may not import"},
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in BROKEN.items() for text in texts])
def test_the_rules_catch_what_they_forbid(file: str, text: str) -> None:
    found = violations(PACKAGE / file, text)
    assert any(BROKEN[file][text] in line for line in found), found


def test_the_public_names_are_sorted_and_there() -> None:
    assert frameloom.__all__ == sorted(frameloom.__all__)
    assert all(getattr(frameloom, name) is not None for name in frameloom.__all__)


def test_importing_the_package_and_its_command_line_loads_no_torch() -> None:
    code = "import frameloom, frameloom.cli, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
