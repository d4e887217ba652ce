"""`muse-hf run`: another Python program in this process, which has the attention "muse" registered."""

import importlib.util
import re
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from muse_hf.text import UsageError

_SCRIPTS = sysconfig.get_path("scripts")


def run_program(command: Sequence[str]) -> None:
    """Run a script, a console command that is a Python script, or `-m module`, as if Python had started it.

    Args:
        command: Its words; a Python interpreter in front of them is dropped.

    Raises:
        UsageError: There is no such program, or it is not a Python program.
    """
    if len(command) > 1 and re.fullmatch(r"python[\d.]*(\.exe)?", Path(command[0]).name):
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
    if name.startswith("-"):
        raise UsageError(f"{name} is an option of Python, which has started already: give it to that one")
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
    # Console commands of an environment are beside its Python, also where it was not activated.
    path = name if Path(name).is_file() else shutil.which(name) or shutil.which(name, path=_SCRIPTS)
    if path is None:
        raise UsageError(f"there is no program {name!r}")
    head = Path(path).read_bytes()[:512]
    if not path.endswith(".py") and not (head.startswith(b"#!") and b"python" in head):
        raise UsageError(f"{name!r} is not a Python program: give a script, a console command or -m module")
    return path
