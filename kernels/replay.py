"""Functions of tensors repeated as the launches they make, without the Python in between.

What a function does that only allocates tensors, takes views of them and launches kernels follows from the
kind of its inputs: their shapes, strides and dtypes, and the settings. `Repeated` runs it as it is the first
time and watches it the second time. From then on it allocates the results, and launches: what else there is
lies in one workspace, where tensors that are not needed at the same time share memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from threading import Lock
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
        if buffer.dtype == look.dtype:
            return buffer.as_strided(look.shape, look.stride, first // buffer.element_size())
        tensor = torch.empty(0, dtype=look.dtype, device=buffer.device)
        return tensor.set_(buffer.untyped_storage(), first // tensor.element_size(), look.shape, look.stride)


@dataclass(frozen=True, eq=False)
class Packing:
    """How tensors lie in one buffer."""

    places: tuple[tuple[Place, Look], ...]
    num_bytes: int


class Saved(NamedTuple):
    """Tensors that only the backward pass sees, packed or one by one."""

    buffers: list[torch.Tensor]
    packing: Packing | None = None

    def tensors(self) -> list[torch.Tensor]:
        """One by one."""
        if self.packing is None:
            return self.buffers
        # What users do with saved tensors may have moved them to an odd place.
        buffers = [buffer.clone() if buffer.data_ptr() % 16 else buffer for buffer in self.buffers]
        return [place.tensor(buffers, look) for place, look in self.packing.places]

    @staticmethod
    def packed(tensors: list[torch.Tensor], device: torch.device) -> "Saved":
        """Copies of tensors: before there is a replay too, checkpointing has to find the buffers of one."""
        packing = _packing_of(
            tuple((_look_of(tensor), tensor.untyped_storage().nbytes()) for tensor in tensors)
        )
        saved = Saved([torch.empty(packing.num_bytes, dtype=torch.uint8, device=device)], packing)
        for target, tensor in zip(saved.tensors(), tensors):
            target.copy_(tensor)
        return saved


@lru_cache(maxsize=1 << 8)
def _packing_of(tensors: tuple[tuple[Look, int], ...]) -> Packing:
    """The one packing of tensors of such looks, and bytes, one after the other."""
    offsets, end = [], 0
    for _, size in tensors:
        offsets.append(end)
        end += _aligned(size)
    return Packing(tuple((Place(0, offset), look) for offset, (look, _) in zip(offsets, tensors)), end)


class Repeated:
    """A function of tensors, `Saved` (of which it gets the tensors) and settings.

    Args:
        function: Returns a list of tensors, and writes to none that it did not allocate. It may do what is
            said above and make library calls, see `library_call`; if it does more, it is never repeated.
        num_shown: How many of the first results are returned as tensors, None: all. Others are `Saved`.
    """

    def __init__(self, function: Callable[..., list[torch.Tensor]], num_shown: int | None = None):
        self.function, self.num_shown = function, num_shown
        # By kind of the inputs: a recording, that the function was seen once, or None if it is not repeated.
        self.recordings: dict[tuple, Any] = {}
        self.lock = Lock()  # devices have threads of their own for the backward pass

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
            results, found = _watch(self.function, args, tensors, self.num_shown)
            self._keep(kind, found)
        else:
            results = self.function(*args)
            if kind not in self.recordings:
                self._keep(kind, _SEEN_ONCE)
        shown = list(results[: self.num_shown])
        return shown, Saved.packed(results[len(shown) :], tensors[0].device)

    def _keep(self, kind: tuple, found: Any) -> None:
        with self.lock:
            self.recordings[kind] = found
            if len(self.recordings) > _MOST_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]


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
        steps: In their order. Buffers are numbered: none, inputs, those that are allocated, the buffer of
            packed results, the workspace, results of library calls.
        allocated: What is allocated to be shown.
        packing: How the buffer of packed results holds them.
        workspace_bytes: Size of this buffer.
        shown: Numbers of the results that are shown.
        constants: Tensors that are there for good.
    """

    device: torch.device
    steps: list[_Call | _Launch]
    allocated: list[Look]
    packing: Packing
    workspace_bytes: int
    shown: list[int]
    constants: list[torch.Tensor]

    def replay(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], Saved]:
        """Do it for other inputs. Returns what `Repeated` does."""
        device = self.device
        buffers = [None, *inputs]
        for shape, stride, dtype in self.allocated:
            buffers.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
        packed, workspace = (
            torch.empty(size, dtype=torch.uint8, device=device)
            for size in (self.packing.num_bytes, self.workspace_bytes)
        )
        buffers += packed, workspace
        starts = [0, *[tensor.data_ptr() for tensor in buffers[1:]]]
        stream = current_stream(device.index)
        for step in self.steps:
            if type(step) is _Call:
                results = _tensors_in(step.function(*[_argument(arg, buffers) for arg in step.args]))
                buffers += results
                starts += [result.data_ptr() for result in results]
            else:
                (_, run, function, metadata, _), (x, y, z), places, others = step
                addresses = [starts[buffer] + offset for buffer, offset in places]
                run(x, y, z, stream, function, metadata, None, None, None, *addresses, *others)
        keep_if_captured(self)
        return [buffers[number] for number in self.shown], Saved([packed], self.packing)


def _argument(arg: Any, buffers: list[torch.Tensor]) -> Any:
    if type(arg) is not tuple:
        return arg
    place, look = arg
    return buffers[place.buffer] if look is None else place.tensor(buffers, look)


def _watch(
    function: Callable, args: list[Any], tensors: list[torch.Tensor], num_shown: int | None
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


class _Buffer(NamedTuple):
    """What is known of a tensor with memory of its own, also when it is gone."""

    start: int
    size: int
    look: Look


class _Watch(TorchDispatchMode):
    """Writes down what a function does. Buffers are: none, inputs, and what is allocated or calls return."""

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.device, self.num_inputs = inputs[0].device, len(inputs)
        self.buffers: list[_Buffer | None] = [None]
        self.input_of: dict[int, int] = {}
        self.owner_of: dict[int, int] = {}  # by storage, the last one where it has had several
        self.views_of_inputs: list[torch.Tensor] = []  # which stay, so that nothing else gets their identity
        for tensor in inputs:
            is_shared = _storage_of(tensor) in self.owner_of
            self.input_of[id(tensor)] = self._add(tensor)
            if is_shared:  # by several inputs: it does not tell whose views they are
                self.owner_of[_storage_of(tensor)] = -1
        self.steps: list[_Call | _Launch] = []
        self.called: list[int] = []
        self.constants: list[torch.Tensor] = []
        self.repeatable, self.is_paused = True, False

    def _add(self, tensor: torch.Tensor) -> int:
        number = self.owner_of[_storage_of(tensor)] = len(self.buffers)
        self.buffers.append(_Buffer(tensor.data_ptr(), tensor.untyped_storage().nbytes(), _look_of(tensor)))
        return number

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op in _ALLOCATIONS and not self.is_paused:
            self._add(result)
        elif not self.is_paused:
            views = result if isinstance(result, (list, tuple)) else [result]
            # A copy may get the storage of what is gone by now: only that of an argument makes it a view.
            viewed = {_storage_of(arg) for arg in args if isinstance(arg, torch.Tensor)} & {*self.owner_of}
            are_views = all(isinstance(x, torch.Tensor) and _storage_of(x) in viewed for x in views)
            self.repeatable &= are_views and not op._schema.is_mutable
            if self.repeatable and (number := self.input_of.get(id(args[0]))):
                self.views_of_inputs += views
                self.input_of |= {id(view): number for view in views}
        return result

    def launch(self, compiled: Compiled | None, grid: tuple[int, int, int], args: tuple) -> None:
        """Take note of a launch. Nothing can be repeated in the interpreter, which compiles nothing."""
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
        if not isinstance(arg, torch.Tensor) or not (place := self._place_of(arg)).buffer:
            return arg
        stays_whole = place.buffer <= self.num_inputs or place.buffer in self.called
        is_whole = place.offset == 0 and _look_of(arg) == self.buffers[place.buffer].look
        return place, None if stays_whole and is_whole else _look_of(arg)

    def _place_of(self, arg: torch.Tensor | float | None) -> Place:
        if not isinstance(arg, torch.Tensor):
            return Place(0, arg or 0)  # kernels do not look at what is passed for None
        number = self.input_of.get(id(arg)) or self.owner_of.get(_storage_of(arg), 0)
        if number == 0:
            self.constants.append(arg)
            return Place(0, arg.data_ptr())
        self.repeatable &= number > 0
        # What holds no numbers has no address, wherever it lies.
        return Place(number, arg.data_ptr() - self.buffers[number].start if arg.numel() else 0)

    def recording(self, results: list[torch.Tensor], num_shown: int | None) -> Recording | None:
        """How to repeat it, if possible.

        Each result has to fill a buffer of its own that is no input, or to begin what comes from a call, but
        that is not packed.
        """
        places, looks = [self._place_of(result) for result in results], [_look_of(x) for x in results]
        numbers = [place.buffer for place in places]
        shown, saved = numbers[:num_shown], numbers[len(numbers[:num_shown]) :]
        if not self.repeatable or min(numbers) <= self.num_inputs or len(set(numbers)) < len(numbers):
            return None
        are_whole = all(
            place.offset == 0
            and (place.buffer in self.called or result.nbytes == self.buffers[place.buffer].size)
            for place, result in zip(places, results)
        )
        if not are_whole or set(saved) & set(self.called):
            return None
        allocated = [number for number in shown if number not in self.called]
        packing = _packing_of(
            tuple((look, self.buffers[number].size) for number, look in zip(saved, looks[len(shown) :]))
        )
        workspace, workspace_bytes = _in_turn(
            {
                number: (self.buffers[number].size, life)
                for number, life in self._lives().items()
                if number > self.num_inputs and number not in {*numbers, *self.called}
            }
        )
        # From here on buffers have the numbers that `Recording` gives them.
        whole = [*range(self.num_inputs + 1), *allocated]
        moved = {number: Place(i, 0) for i, number in enumerate(whole)}
        moved |= {n: Place(len(whole), place.offset) for n, (place, _) in zip(saved, packing.places)}
        moved |= {number: Place(len(whole) + 1, offset) for number, offset in workspace.items()}
        moved |= {number: Place(len(whole) + 2 + i, 0) for i, number in enumerate(self.called)}
        return Recording(
            device=self.device,
            steps=[_moved(step, moved) for step in self.steps],
            allocated=[look for number, look in zip(numbers, looks) if number in allocated],
            packing=packing,
            workspace_bytes=workspace_bytes,
            shown=[moved[number].buffer for number in shown],
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


def _in_turn(buffers: dict[int, tuple[int, range]]) -> tuple[dict[int, int], int]:
    """Offsets of buffers that share memory where their lives allow it, and the bytes of all.

    Args:
        buffers: Size and life of each.
    """
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
