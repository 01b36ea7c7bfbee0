"""Reads the pickle of a PyTorch file into inert pieces: nothing it names is imported, called or changed. Torch-free.

`torch.load(weights_only=True)` does not run what a file says either, but does not tell where in the file a tensor lies,
and builds whatever is asked for, such as a `bytearray` of any size. A state dict needs the few opcodes below.
"""

import itertools
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frameloom.errors import CheckpointError

MAX_STEPS = 2**19  # opcodes; a tensor takes about 30

_STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": "U8", "torch.UntypedStorage": "U8",
}  # fmt: skip
# Dtypes newer than typed storages: such a tensor names its own, over a storage of bytes.
_DTYPES: Mapping[str, str] = {
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """`size` numbers of `dtype` in the zip's member data/`key`."""

    dtype: str
    key: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A tensor over a storage; `offset` and `stride` count numbers of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickle(path: Path, pickle: bytes) -> Any:
    """The value that `pickle`, found in the file `path`, describes: dicts, lists and tuples of plain values and views.

    Raises CheckpointError for what is damaged, and for every name or opcode that no state dict needs.
    """
    machine = _Machine(path)
    try:
        for opcode, argument, _ in itertools.islice(pickletools.genops(pickle), MAX_STEPS):
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except CheckpointError:
        raise
    except Exception:  # an opcode that finds other things on the stack than it needs: one answer for all of them
        raise CheckpointError(f"{path} holds no readable list of tensors; download it again") from None


# --- what a state dict names, and what stands in for it ---


@dataclass(frozen=True, kw_only=True, slots=True)
class _Global:
    """What the pickle would import; here it is only a name."""

    name: str


def _view(dtype: str, storage: Any, *, offset: Any, shape: Any, stride: Any) -> View:
    well_formed = isinstance(storage, Storage) and type(shape) is type(stride) is tuple
    if not well_formed or not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
        raise TypeError("no view of a storage")
    return View(storage=storage, dtype=dtype, offset=offset, shape=shape, stride=stride)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, bits: Any = None
) -> View:
    if bits:
        raise TypeError("a tensor to be negated or conjugated when it is read")
    return _view(storage.dtype, storage, offset=offset, shape=shape, stride=stride)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> View:
    if bits:
        raise TypeError("a tensor to be negated when it is read")
    return _view(_DTYPES[dtype.name], storage, offset=offset, shape=shape, stride=stride)


def _first(value: Any, *_: object) -> Any:
    return value


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch.Size": _first,
    "torch.device": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
}


# --- the opcodes ---


class _Machine:
    """A stack of values, marks in it, and a memo of values met before."""

    def __init__(self, path: Path) -> None:
        self.stack: list[Any] = []
        self._path = path
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Do what one opcode says."""
        if opcode in _PUSHES:
            self.stack.append(argument)
        elif opcode in _NEW:
            self.stack.append(_NEW[opcode]())
        elif opcode in _STEPS:
            _STEPS[opcode](self, argument)
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise self._foreign(f"the opcode {opcode}")

    def global_(self, argument: str) -> None:
        self._name(argument.replace(" ", ".", 1))

    def stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(f"{module}.{name}")

    def call(self, _: None) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(_CALLS[called.name](*arguments))

    def storage(self, _: None) -> None:
        tag, kind, key, _, size = self.stack.pop()
        if tag != "storage" or type(key) is not str or type(size) is not int or size < 0:
            raise TypeError("no storage")
        self.stack.append(Storage(dtype=_STORAGES[kind.name], key=key, size=size))

    def drop(self, _: None) -> None:
        """BUILD would set attributes, as state_dict() sets `_metadata` on its OrderedDict: none is needed."""
        self.stack.pop()

    def mark(self, _: None) -> None:
        self._marks.append(len(self.stack))

    def put(self, argument: int) -> None:
        self._memo[argument] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def get(self, argument: int) -> None:
        self.stack.append(self._memo[argument])

    def tuple_(self, _: None) -> None:
        self.stack.append(tuple(self._above_mark()))

    def tuple_of(self, count: int) -> None:
        values = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def appends(self, _: None) -> None:
        self._extend(self._above_mark())

    def set_item(self, _: None) -> None:
        self._update([self.stack.pop(-2), self.stack.pop()])

    def set_items(self, _: None) -> None:
        self._update(self._above_mark())

    def _name(self, name: str) -> None:
        if name not in _CALLS and name not in _STORAGES and name not in _DTYPES:
            raise self._foreign(repr(name[:80]))
        self.stack.append(_Global(name=name))

    def _above_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("no list to append to")
        target.extend(values)

    def _update(self, values: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            # the hash of a deeply nested tuple would overflow the stack
            if type(target) is not dict or type(key) not in (str, int) or key in target:
                raise TypeError("no dict, a key that names nothing, or the same key again")
            target[key] = value

    def _foreign(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} asks for {what}, which weights do not need and which could run code; "
            "convert it to safetensors if you trust it"
        )


_PUSHES = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING")
)
_NEW: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "BINPERSID": _Machine.storage,
    "BUILD": _Machine.drop,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
}
