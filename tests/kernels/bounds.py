"""A check of every access of interpreted kernels: it lies in a tensor that the launch was given.

Out of bounds, the interpreter reads and overwrites what is there, to be found out at random, later or never.
"""

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


def check_accesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on an access outside of all arguments raises."""
    ranges: list[tuple[int, int]] = []
    arguments_of = interpreter.GridExecutor._init_args_hst
    builder = interpreter.InterpreterBuilder

    def remember(self: Any, args: Any, kwargs: Any) -> tuple:
        args, kwargs = arguments_of(self, args, kwargs)
        storages = [arg.untyped_storage() for arg in (*args, *kwargs.values()) if hasattr(arg, "data_ptr")]
        ranges[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        return args, kwargs

    def checked(access: Any, name: str, mask_at: int) -> Any:
        def check(self: Any, pointers: Any, *others: Any) -> Any:
            size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
            addresses = pointers.data[np.broadcast_to(others[mask_at].data, pointers.data.shape) != 0]
            inside = np.zeros(addresses.shape, bool)
            for begin, end in ranges:
                inside |= (addresses >= begin) & (addresses + size <= end)
            if not inside.all():
                raise IndexError(
                    f"{(~inside).sum()} of {inside.size} addresses of a {name} are of no argument"
                )
            return access(self, pointers, *others)

        return check

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", remember)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name), name.rpartition("_")[2], mask_at))
