"""What a module's forward does besides returning its result. The operator would not do it, so such a layer is left.

Three things are watched while a copy runs (:class:`Watch`): what the copy holds, to any depth; what the code that runs
names outside of it (globals, closures, attributes of classes); and calls that write, print, log or send. A copy cannot
have globals and closures of its own, so what has been changed there is put back.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import enum
import functools
import gc
import io
import itertools
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import torch_private

__all__ = ["Effect", "Watch", "add_numbers", "is_foreign"]

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), enum.Enum, types.CodeType, weakref.ref,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)
_ITERATORS = (itertools.count, itertools.cycle)  # which show where they are
_MOST = 100_000  # objects, before it is said to be too much
_CLONED = 1 << 20  # elements of a tensor that is compared by value, too
_LOGS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log")
_WRITES = (print, input, open, exec, breakpoint)
_OUTSIDE = ("posix", "nt", "_io", "io", "_queue", "_socket", "_thread", "_winapi")  # what reaches beyond the process
_OURS_AND_TORCHS = ("torch", "senet_fused")


class Effect(BaseException):
    """Stops a forward at something that it does besides; no ``except Exception`` in it is to catch that."""


def is_foreign(module: object) -> bool:
    """Whether code of a module of this name is neither PyTorch's, nor this package's, nor the standard library's."""
    root = str(module).partition(".")[0]
    return root not in _OURS_AND_TORCHS and root not in sys.stdlib_module_names


class _Snapshot:
    """An object as it was: its parts, by the ends of their names, and its value where it has one of its own."""

    def __init__(self, label: str, thing: Any) -> None:
        self.label, self.thing = label, thing
        self.parts, self.value = _parts(thing), _value(thing)

    def change(self) -> str | None:
        """What has been changed since; None if nothing has."""
        now, before = _parts(self.thing), self.parts
        if [name for name, _ in now] != [name for name, _ in before]:
            new = [name for name, _ in now if name not in dict(before)]
            return self.label + (new[0] if new and isinstance(self.thing, (dict, type)) else "")
        for (name, was), (_, part) in zip(before, now, strict=True):
            if was is not part and not (type(was) is type(part) and isinstance(was, _ATOMS) and was == part):
                return self.label + name
        return None if _same(self.value, _value(self.thing)) else self.label

    def restore(self) -> None:
        """Makes a thing that can be changed what it was."""
        thing, before = self.thing, dict(self.parts)
        if isinstance(thing, dict):
            for key, (name, _) in list(zip(dict.keys(thing), _parts(thing), strict=False)):
                if name in before:
                    dict.__setitem__(thing, key, before[name])
                else:
                    dict.__delitem__(thing, key)
        elif isinstance(thing, (list, set, collections.deque)):
            items = [part for name, part in self.parts if name.startswith("[")]
            thing.clear()
            (thing.update if isinstance(thing, set) else thing.extend)(items)
        elif isinstance(thing, type):
            now = {f".{name}" for name in vars(thing) if not name.startswith("__")}
            for name in now - before.keys():
                delattr(thing, name[1:])
            for name, part in before.items():
                if name and vars(thing).get(name[1:], thing) is not part:
                    setattr(thing, name[1:], part)
        elif isinstance(thing, types.FunctionType):
            for cell, (_, part) in zip(thing.__closure__ or (), self.parts, strict=False):
                if _inside(cell) is not part:
                    cell.cell_contents = part
        elif isinstance(thing, Tensor) and self.value[1] is not None:
            thing.data.copy_(self.value[1])
        elif hasattr(self.value, "tobytes"):
            thing[...] = self.value


class _Contents:
    """All that is reachable from some objects, as it was when they were added."""

    def __init__(self) -> None:
        self.known: dict[int, _Snapshot | None] = {}  # None: of what may change

    def add(self, label: str, thing: Any) -> None:
        waiting = [(label, thing)]
        while waiting:
            label, thing = waiting.pop()
            if isinstance(thing, _ATOMS) or id(thing) in self.known:
                continue
            if len(self.known) > _MOST:
                raise Effect("it reaches too many objects to compare them before and after its forward")
            self.known[id(thing)] = snapshot = _Snapshot(label, thing)
            waiting += [(label + name, part) for name, part in snapshot.parts]

    def changed(self) -> list[tuple[str, _Snapshot]]:
        """What has been changed: what it is called, and as it was."""
        found = ((one.change(), one) for one in self.known.values() if one is not None)
        return [(name, one) for name, one in found if name is not None]

    def restore(self) -> None:
        """Puts everything back that has been changed."""
        for _, one in self.changed():
            one.restore()


# What consists of other objects, and the attributes that hold them.
_HOLDERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (types.MethodType, ("__self__", "__func__")),
    (types.BuiltinMethodType, ("__self__",)),
    (functools.partial, ("func", "args", "keywords")),
    ((staticmethod, classmethod), ("__func__",)),
    ((Tensor, types.ModuleType), ()),
)


def _parts(thing: Any) -> list[tuple[str, Any]]:
    """What an object consists of, each with the end of its name."""
    for kinds, names in _HOLDERS:
        if isinstance(thing, kinds):
            return [("", getattr(thing, name)) for name in names]
    kind, parts = type(thing), []
    if isinstance(thing, dict):
        parts = [(_key(key), part) for key, part in dict.items(thing)]
    elif isinstance(thing, _SEQUENCES):
        parts = [(f"[{i}]", part) for i, part in enumerate(thing)]
    elif isinstance(thing, (type, types.FunctionType)):
        if not is_foreign(thing.__module__):
            return []
        if isinstance(thing, type):
            own = [(f".{name}", part) for name, part in vars(thing).items() if not name.startswith("__")]
            return own + [("", base) for base in thing.__bases__]
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        closure = [(f".{name}", _inside(cell)) for name, cell in cells]
        return [*closure, *(("", part) for part in (thing.__defaults__, thing.__kwdefaults__, vars(thing)))]
    # PyTorch's own objects change as they like (a generator, a process group); its modules do not.
    if isinstance(thing, nn.Module) or is_foreign(kind.__module__) or kind is types.SimpleNamespace:
        with contextlib.suppress(Exception):
            parts.append(("", vars(thing)))
        for base in kind.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                with contextlib.suppress(Exception):
                    parts.append((f".{name}", getattr(thing, name)))
        parts.append(("", kind))
    return parts


def _key(key: object) -> str:
    if isinstance(key, str):
        return f".{key}"
    return f"[{key!r}]" if isinstance(key, _ATOMS) else f"[a {type(key).__name__} at {id(key):#x}]"


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _value(thing: Any) -> Any:
    """A tensor's version and a copy of its values; of a few other things their values."""
    if isinstance(thing, _ITERATORS):
        return repr(thing)
    if isinstance(thing, Tensor):
        seen = thing.device.type == "cpu" and thing.layout == torch.strided and thing.numel() <= _CLONED
        return torch_private.version_of(thing), thing.detach().clone() if seen else None
    numpy = sys.modules.get("numpy")
    return thing.copy() if numpy is not None and isinstance(thing, numpy.ndarray) else None


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, tuple) and isinstance(now, tuple):
        return all(map(_same, before, now))
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return before.shape == now.shape and torch.equal(before.nan_to_num(), now.nan_to_num())
    if hasattr(before, "tobytes") and hasattr(now, "tobytes"):
        return before.tobytes() == now.tobytes()
    return type(before) is type(now) and before == now


class Watch:
    """Runs a module, a copy of somebody's, and stops at what its forward does besides.

    numbers: the whole numbers that the code that has run names or holds. names: all names in it.
    """

    def __init__(self, copied: nn.Module, *, buffers: bool = True) -> None:
        """buffers: whether the forward has to leave them as they are."""
        self.numbers: dict[int, str] = {}
        self.names: set[str] = set()
        self._copied, self._buffers = copied, buffers
        self._first, self._before = _Contents(), _Contents()  # outside the module: when first seen, and later
        self._foreign: dict[types.CodeType, bool] = {}
        self._settled = False
        self._importing: types.FrameType | None = None

    def settle(self) -> None:
        """From here on, what lies outside may not be changed. Before, other people's caches may be filled."""
        self._before, self._settled = _Contents(), True
        for one in self._first.known.values():
            self._before.add(one.label, one.thing)

    def restore(self) -> None:
        """What lies outside is afterwards as it was before the module has run."""
        self._first.restore()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The module runs within this block. Raises Effect if it has done anything besides."""
        own = _Contents()
        if not self._buffers:
            for module in self._copied.modules():
                own.known.update((id(thing), None) for thing in (module._buffers, *module._buffers.values()))
        own.add("its", self._copied)
        try:
            with self._hooked():
                yield
        finally:
            changed = own.changed()
            for _, one in changed:
                one.restore()
        if not changed and self._settled:
            changed = self._before.changed()
        if changed:
            name = changed[0][0]
            for container in ("._modules", "._parameters", "._buffers"):
                name = name.replace(container, "")
            name = name.replace("its.", "its ", 1)
            raise Effect(f"its forward changes {name}, which the operator would not")

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        others = sys.getprofile()
        if others is None or callable(others):
            start, stop = sys.setprofile, functools.partial(sys.setprofile, others)
        elif hasattr(others, "disable"):  # cProfile's
            others.disable()
            start, stop = sys.setprofile, lambda: (sys.setprofile(None), others.enable())
        else:
            raise Effect("a profiler watches all calls, as the proof has to; fuse before it starts")
        # A collection calls other people's code (gc.callbacks), which is none of the forward's.
        collects = gc.isenabled()
        gc.disable()
        start(self._saw)
        try:
            yield
        finally:
            stop()
            if collects:
                gc.enable()
            self._importing = None

    def _saw(self, frame: types.FrameType, event: str, given: Any) -> None:
        code = frame.f_code
        if self._importing is not None or code.co_name == "<module>":  # an import, which happens once
            if event in ("call", "return") and self._importing in (None, frame):
                self._importing = frame if event == "call" else None
            return
        foreign = self._foreign.get(code)
        if event == "call":
            if foreign is None:
                foreign = self._foreign[code] = is_foreign(frame.f_globals.get("__name__"))
                if foreign:
                    self._read(code, frame)
            if foreign and code.co_freevars:
                self._close(code, frame)
            if not foreign and code.co_name in _LOGS and self._is_called(frame, "logging"):
                raise Effect(f"its forward logs ({code.co_name}), which the operator would not")
        elif event == "c_call":
            if foreign and _writes(given):
                raise Effect(f"its forward calls {given.__name__}, which the operator would not")
        elif event == "return" and given is None and foreign is False and self._is_called(frame):
            # A queue, say: a function that computes nothing. What foreign code does is seen inside of it.
            if not code.co_flags & _GENERATOR and not code.co_name.startswith("__"):
                raise Effect(f"its forward calls {code.co_name}, which the operator would not")

    def _is_called(self, frame: types.FrameType, of: str = "") -> bool:
        """Whether a function of the standard library, or of that module of it, has been called by foreign code."""
        root = str(frame.f_globals.get("__name__")).partition(".")[0]
        called = frame.f_back is not None and self._foreign.get(frame.f_back.f_code, False)
        return called and root not in _OURS_AND_TORCHS and of in ("", root)

    def _read(self, code: types.CodeType, frame: types.FrameType) -> None:
        """Looks at code that is about to run for the first time: what it stores, and what it names outside."""
        names = _names(code, self.numbers)
        self.names |= names
        for opcode in dis.get_instructions(code):
            if opcode.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise Effect(f"its forward sets the global {opcode.argval}, which the operator would not")
        here = frame.f_globals
        places = {name: here.get(name, sys.modules.get(name)) for name in names}
        seen: set[int] = set()
        while places:
            within: dict[str, Any] = {}
            for name, value in places.items():
                if isinstance(value, types.ModuleType):
                    if id(value) not in seen and is_foreign(value.__name__):
                        within |= {f"{name}.{n}": vars(value)[n] for n in names if n in vars(value)}
                    seen.add(id(value))
                else:
                    self._outside(f"{name} of {here.get('__name__')}", value)
            places = within

    def _close(self, code: types.CodeType, frame: types.FrameType) -> None:
        """Looks at what a closure that is about to run shares with the function around it."""
        values = frame.f_locals
        callers, caller = [], frame.f_back
        while caller is not None:
            callers.append(caller.f_code)
            caller = caller.f_back
        for name in code.co_freevars:
            if any(self._foreign.get(by) and name in by.co_cellvars for by in callers):
                continue  # of a function that is running
            if name in values:
                self._outside(f"{name} of {code.co_name}", values[name])
            stores = (o.argval for o in dis.get_instructions(code) if o.opname in ("STORE_DEREF", "DELETE_DEREF"))
            if name in stores:
                raise Effect(f"its forward sets {name} of {code.co_name}, which the operator would not")

    def _outside(self, label: str, value: Any) -> None:
        if isinstance(value, (*_ITERATORS, types.GeneratorType)):  # which cannot be put back
            raise Effect(f"its forward uses the iterator {label}, which the operator would not")
        self._first.add(label, value)
        self._before.add(label, value)
        add_numbers(value, label, self.numbers)


_GENERATOR = 0x20 | 0x80 | 0x200  # inspect's CO_GENERATOR and its two asynchronous kin, whose end is no result


def _writes(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    kind = getattr(function, "__module__", None) or type(owner).__module__
    return isinstance(owner, io.IOBase) or any(function is one for one in _WRITES) or kind in _OUTSIDE


def _names(code: types.CodeType, numbers: dict[int, str]) -> set[str]:
    """The names that code uses, also those within it; its constants are added to the numbers."""
    names = set(code.co_names)
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            names |= _names(value, numbers)
        else:
            add_numbers(value, code.co_name, numbers)
    return names


def add_numbers(value: object, label: str, numbers: dict[int, str]) -> None:
    """Adds the whole numbers above one in a constant or an attribute, also those in it."""
    if isinstance(value, (tuple, list, set, frozenset)):
        for part in value:
            add_numbers(part, label, numbers)
    elif isinstance(value, dict):
        add_numbers(list(value.values()), label, numbers)
    elif type(value) in (int, float) and abs(value) > 1 and value == value // 1:
        numbers.setdefault(abs(int(value)), label)
