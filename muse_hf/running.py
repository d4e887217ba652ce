"""`muse-hf run`: another Python program in this process, which has the attention "muse" registered."""

import importlib.util
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from muse_hf.text import UsageError


def run_program(command: Sequence[str]) -> None:
    """Run a script, a console command that is a Python script, or `-m module`, as if Python had started it.

    Args:
        command: Its words; a Python interpreter in front of them is dropped.

    Raises:
        UsageError: There is no such program, or it is not a Python program.
    """
    if command and Path(command[0]).name.startswith("python") and len(command) > 1:
        command = command[1:]
    if not command:
        raise UsageError("no command was given: muse-hf run -- script.py arguments")
    name, *arguments = command
    if name == "-m":
        if not arguments or not _module_exists(arguments[0]):
            raise UsageError(f"there is no module {' '.join(arguments[:1])!r} to run")
        sys.argv, sys.path[0] = list(arguments), ""
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    path = _python_file(name)
    sys.argv, sys.path[0] = [path, *arguments], str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def _module_exists(name: str) -> bool:
    sys.path.insert(0, "")
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it should be in
        return False
    finally:
        sys.path.pop(0)


def _python_file(name: str) -> str:
    path = name if Path(name).is_file() else shutil.which(name)
    if path is None:
        raise UsageError(f"there is no program {name!r}")
    head = Path(path).read_bytes()[:512]
    if not path.endswith(".py") and not (head.startswith(b"#!") and b"python" in head):
        raise UsageError(f"{name!r} is not a Python program: give a script, a console command or -m module")
    return path
