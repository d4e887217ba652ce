"""Functions of tensors repeated as the launches they make, without the Python in between.

What a function does that only allocates tensors, takes views of them and launches kernels follows from the
kind of its inputs: their shapes, strides and dtypes, and the settings. `Repeated` runs it as it is the first
time and watches it the second time. From then on it allocates the results, and launches: what else there is
lies in one workspace, where tensors that are not needed at the same time share memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from muse_hf.kernels.common import keep_if_captured
from muse_hf.kernels.launch import Compiled, current_stream, is_hooked, watcher
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}
# Tensors begin in buffers at multiples of as many bytes as PyTorch allocates them at.
_ALIGNMENT = 512
_MOST_RECORDINGS = 64
_SEEN_ONCE = object()


class Look(NamedTuple):
    """What a tensor is, wherever it lies."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a tensor lies: the number of a buffer, and bytes from its start; or address 0, and a number."""

    buffer: int
    offset: int

    def tensor(self, buffers: list[torch.Tensor], look: Look) -> torch.Tensor:
        """The tensor that lies here."""
        buffer = buffers[self.buffer]
        first = buffer.storage_offset() * buffer.element_size() + self.offset
        tensor = torch.empty(0, dtype=look.dtype, device=buffer.device)
        return tensor.set_(buffer.untyped_storage(), first // tensor.element_size(), look.shape, look.stride)


@dataclass(frozen=True, eq=False)
class Packing:
    """How tensors lie in buffers."""

    places: tuple[tuple[Place, Look], ...]


class Saved(NamedTuple):
    """Tensors that only the backward pass sees, packed or one by one."""

    buffers: list[torch.Tensor]
    packing: Packing | None = None

    def tensors(self) -> list[torch.Tensor]:
        """One by one."""
        if self.packing is None:
            return self.buffers
        return [place.tensor(self.buffers, look) for place, look in self.packing.places]


class Repeated:
    """A function of tensors, `Saved` (of which it gets the tensors) and settings.

    Args:
        function: Returns a list of tensors, and writes to none that it did not allocate. It may do what is
            said above and make library calls, see `library_call`; if it does more, it is never repeated.
        num_shown: How many of the first results are returned as tensors. The others are `Saved`.
    """

    def __init__(self, function: Callable[..., list[torch.Tensor]], num_shown: int):
        self.function, self.num_shown = function, num_shown
        # By kind of the inputs: a recording, that the function was seen once, or None if it is not repeated.
        self.recordings: dict[tuple, Any] = {}

    def __call__(self, *args: Any) -> tuple[list[torch.Tensor], Saved]:
        tensors, kind = [], []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                tensors.append(arg)
                kind += arg.shape, arg.stride(), arg.dtype, arg.data_ptr() & 15
            elif isinstance(arg, Saved):
                kind.append(arg.packing)
                for tensor in arg.buffers:
                    tensors.append(tensor)
                    kind += tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15
            else:
                kind.append(tuple(arg) if isinstance(arg, list) else arg)
        kind = (tensors[0].get_device(), *kind)
        recording = self.recordings.get(kind)
        if type(recording) is Recording and not is_hooked():
            return recording.replay(tensors)
        args = [arg.tensors() if isinstance(arg, Saved) else arg for arg in args]
        if recording is _SEEN_ONCE and len({*map(id, tensors)}) == len(tensors):
            results, self.recordings[kind] = _watch(self.function, args, tensors, self.num_shown)
        else:
            results = self.function(*args)
            self.recordings.setdefault(kind, _SEEN_ONCE)
            if len(self.recordings) > _MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]
        return results[: self.num_shown], Saved(results[self.num_shown :])


def library_call(function: Callable) -> Callable:
    """A function of tensors and settings that launches kernels of libraries, and is repeated by calling it.

    It returns a tuple, in which all tensors are new ones.
    """

    @wraps(function)
    def call(*args: Any) -> tuple:
        watch = watcher.get()
        return function(*args) if watch is None or watch.is_paused else watch.call(function, args)

    return call


@library_call
def fill(tensor: torch.Tensor, number: float) -> tuple[()]:
    """`tensor.fill_(number)`."""
    tensor.fill_(number)
    return ()


@library_call
def copy(source: torch.Tensor, target: torch.Tensor) -> tuple[()]:
    """`target.copy_(source)`."""
    target.copy_(source)
    return ()


class _Call(NamedTuple):
    """A library call. Of its arguments, tensors are a `Place` and a `Look`, or None if a whole buffer."""

    function: Callable
    args: list[Any]


class _Launch(NamedTuple):
    """A launch: the leading arguments up to the last tensor are places, the others constants."""

    compiled: Compiled
    grid: tuple[int, int, int]
    places: list[Place]
    others: tuple[Any, ...]


@dataclass(frozen=True)
class Recording:
    """What a function does for inputs of one kind.

    Attributes:
        steps: In their order. Buffers are numbered: none, inputs, results that are shown, those of which
            other tensors become parts (the packed results and the workspace), results of library calls.
        shown: Results that are shown.
        packed_bytes, workspace_bytes: Sizes of these two.
        saved, packing: Numbers of the buffers that hold the other results, and how they hold them.
        constants: Tensors that are there for good.
    """

    device: torch.device
    steps: list[_Call | _Launch]
    shown: list[Look]
    packed_bytes: int
    workspace_bytes: int
    saved: list[int]
    packing: Packing
    constants: list[torch.Tensor]

    def replay(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], Saved]:
        """Do it for other inputs. Returns what `Repeated` does."""
        device = self.device
        shown = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype in self.shown
        ]
        packed = torch.empty(self.packed_bytes, dtype=torch.uint8, device=device)
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        buffers = [None, *inputs, *shown, packed, workspace]
        starts = [0, *[tensor.data_ptr() for tensor in buffers[1:]]]
        stream = current_stream(device.index)
        for step in self.steps:
            if type(step) is _Call:
                results = _tensors_in(step.function(*(_argument(arg, buffers) for arg in step.args)))
                buffers += results
                starts += [result.data_ptr() for result in results]
            else:
                (_, run, function, metadata, _), (x, y, z), places, others = step
                addresses = [starts[buffer] + offset for buffer, offset in places]
                run(x, y, z, stream, function, metadata, None, None, None, *addresses, *others)
        keep_if_captured(self)
        return shown, Saved([buffers[number] for number in self.saved], self.packing)


def _argument(arg: Any, buffers: list[torch.Tensor]) -> Any:
    if type(arg) is not tuple:
        return arg
    place, look = arg
    return buffers[place.buffer] if look is None else place.tensor(buffers, look)


def _watch(
    function: Callable, args: list[Any], tensors: list[torch.Tensor], num_shown: int
) -> tuple[list[torch.Tensor], Recording | None]:
    """The results of a function, and how to repeat it if that can be done."""
    watch = _Watch(tensors)
    token = watcher.set(watch)
    try:
        with watch:
            results = function(*args)
    finally:
        watcher.reset(token)
    return results, watch.recording(results, num_shown)


class _Watch(TorchDispatchMode):
    """Writes down what a function does. Buffers are: none, inputs, and what is allocated or calls return."""

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.num_inputs = len(inputs)
        self.buffers: list[torch.Tensor | None] = [None]  # all live on, so that no storage is taken twice
        self.number_of: dict[int, int] = {}
        self.owner_of: dict[int, int] = {}
        for tensor in inputs:
            self.number_of[id(tensor)] = self._add(tensor)
        self.steps: list[_Call | _Launch] = []
        self.called: list[int] = []
        self.constants: list[torch.Tensor] = []
        self.repeatable, self.is_paused = True, False

    def _add(self, tensor: torch.Tensor) -> int:
        number, storage = len(self.buffers), _storage_of(tensor)
        # Inputs may share a storage. Which of them another part of it belongs to is not known: -1.
        self.owner_of[storage] = -1 if storage in self.owner_of else number
        self.buffers.append(tensor)
        return number

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op in _ALLOCATIONS and not self.is_paused:
            self._add(result)
        elif not self.is_paused:
            views = result if isinstance(result, (list, tuple)) else [result]
            are_views = all(isinstance(x, torch.Tensor) and _storage_of(x) in self.owner_of for x in views)
            self.repeatable &= are_views and not op._schema.is_mutable
        return result

    def launch(self, compiled: Compiled | None, grid: tuple[int, int, int], args: tuple) -> None:
        """Take note of a launch; not of those of the interpreter, which compiles nothing."""
        if self.is_paused:
            return
        self.repeatable &= compiled is not None
        if self.repeatable:
            last = max(i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)) + 1
            places = [self._place_of(arg) for arg in args[:last]]
            self.steps.append(_Launch(compiled, grid, places, (*args[last:], *compiled.constants)))

    def call(self, function: Callable, args: tuple) -> tuple:
        """Call a library and take note of it."""
        self.is_paused = True
        results = function(*args)
        self.is_paused = False
        self.steps.append(_Call(function, [self._argument(arg) for arg in args]))
        self.called += [self._add(tensor) for tensor in _tensors_in(results)]
        return results

    def _argument(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        place = self._place_of(arg)
        stays_whole = place.buffer <= self.num_inputs or place.buffer in self.called
        return place, None if stays_whole and self.buffers[place.buffer] is arg else _look_of(arg)

    def _place_of(self, arg: torch.Tensor | float | None) -> Place:
        if not isinstance(arg, torch.Tensor):
            return Place(0, arg or 0)  # kernels do not look at what is passed for None
        number = self.number_of.get(id(arg)) or self.owner_of.get(_storage_of(arg), 0)
        if number == 0:
            self.constants.append(arg)
            return Place(0, arg.data_ptr())
        self.repeatable &= number > 0
        return Place(number, arg.data_ptr() - self.buffers[number].data_ptr())

    def recording(self, results: list[torch.Tensor], num_shown: int) -> Recording | None:
        """How to repeat it, if possible: all results have to be new, and no two may share a buffer."""
        places, looks = [self._place_of(result) for result in results], [_look_of(x) for x in results]
        numbers = [place.buffer for place in places]
        shown, saved = numbers[:num_shown], numbers[num_shown:]
        are_new = min(numbers) > self.num_inputs and len(set(numbers)) == len(numbers)
        are_whole = not any(place.offset for place in places) and not set(shown) & set(self.called)
        if not (self.repeatable and are_new and are_whole):
            return None
        new = [n for n in range(self.num_inputs + 1, len(self.buffers)) if n not in self.called]
        packed, packed_bytes = _side_by_side({n: self.buffers[n].nbytes for n in saved if n in new})
        lives = self._lives()
        workspace, workspace_bytes = _in_turn(
            {n: (self.buffers[n].nbytes, lives[n]) for n in new if n in lives and n not in numbers}
        )
        # The buffers of a replay: none, inputs and shown results, what is packed, the workspace, and results
        # of calls.
        kept = [*range(self.num_inputs + 1), *shown]
        holder = len(kept)
        moved = {number: Place(i, 0) for i, number in enumerate(kept)}
        moved |= {number: Place(holder, offset) for number, offset in packed.items()}
        moved |= {number: Place(holder + 1, offset) for number, offset in workspace.items()}
        moved |= {number: Place(holder + 2 + i, 0) for i, number in enumerate(self.called)}
        holders = [holder, *(moved[n].buffer for n in saved if n in self.called)]
        return Recording(
            device=self.buffers[1].device,
            steps=[_moved(step, moved) for step in self.steps],
            shown=looks[:num_shown],
            packed_bytes=packed_bytes,
            workspace_bytes=workspace_bytes,
            saved=holders,
            packing=Packing(
                tuple(
                    (Place(holders.index(moved[n].buffer), moved[n].offset), look)
                    for n, look in zip(saved, looks[num_shown:])
                )
            ),
            constants=self.constants,
        )

    def _lives(self) -> dict[int, range]:
        """Steps from the first that uses a buffer to the last."""
        lives: dict[int, range] = {}
        for i, step in enumerate(self.steps):
            for place in _places_in(step):
                first = lives.get(place.buffer, range(i, i)).start
                lives[place.buffer] = range(first, i + 1)
        return lives


def _side_by_side(sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """Offsets of buffers of as many bytes, and the bytes of all."""
    offsets, end = {}, 0
    for number, size in sizes.items():
        offsets[number] = end
        end += _aligned(size)
    return offsets, end


def _in_turn(buffers: dict[int, tuple[int, range]]) -> tuple[dict[int, int], int]:
    """The same for buffers that share memory where their lives allow it."""
    offsets, placed = {}, []
    for number, (size, life) in sorted(buffers.items(), key=lambda item: -item[1][0]):
        offset = 0
        for begin, end, other in sorted(placed, key=lambda taken: taken[0]):
            if other.start < life.stop and life.start < other.stop:
                if offset + size <= begin:
                    break
                offset = max(offset, end)
        offsets[number] = offset
        placed.append((offset, offset + _aligned(size), life))
    return offsets, max((end for _, end, _ in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _places_in(step: _Call | _Launch) -> list[Place]:
    if isinstance(step, _Launch):
        return step.places
    return [arg[0] for arg in step.args if type(arg) is tuple]


def _moved(step: _Call | _Launch, moved: dict[int, Place]) -> _Call | _Launch:
    """A step on the buffers of a replay."""

    def move(place: Place) -> Place:
        buffer, offset = moved[place.buffer]
        return Place(buffer, offset + place.offset)

    if isinstance(step, _Launch):
        return step._replace(places=[move(place) for place in step.places])
    return step._replace(args=[(move(arg[0]), arg[1]) if type(arg) is tuple else arg for arg in step.args])


def _look_of(tensor: torch.Tensor) -> Look:
    return Look(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors_in(results: tuple) -> list[torch.Tensor]:
    return [result for result in results if isinstance(result, torch.Tensor)]
