"""The argument parser, the version option and the last error handler of every command line of this project.

In: an `argparse` parser, or an exception that reached a `main`. Out: options, one-paragraph messages and exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import tomllib
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from data_prep.names import one_line
from data_prep.unreadable import ADVICE

DISTRIBUTION = "minilmv2-distillation"
VERBOSE = "MINILMV2_VERBOSE"
VERBOSE_HELP = (
    f"{VERBOSE}=1 in the environment also shows messages of DeepSpeed, transformers and pip, and all log points."
)
FIRST_RANK_S = 3.0  # `deepspeed` looks at its processes every second
PROGRAM = "minilmv2"  # has the verbs of these packages
VERB_PACKAGES = ("data_prep", "pipeline")
EXIT_USER = 2
EXIT_INTERRUPTED = 128 + 2  # as a shell has it for SIGINT
EXIT_NO_READER = 128 + 13  # for SIGPIPE
# Errors of the machine, which its administrator can fix. Others without the name of a file (a closed descriptor) are bugs here.
_OF_THE_MACHINE = {
    errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EADDRINUSE, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def is_verbose() -> bool:
    """Whether the environment asks for the messages of the libraries, and for every log point of a training."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


def print_bytes_as_they_come() -> None:
    """Escape what stdout and stderr cannot encode: paths that are not UTF-8, and any text on an ASCII terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def paragraph_of(error: BaseException) -> str | None:
    """One paragraph about an error that the user or the administrator of the machine can fix; None for a bug.

    This is the last handler of every command. Code that knows the file, key or option raises an error that says more.
    """
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"Memory ran out ({one_line(error)[:600] or place_of(error)}). Use smaller sizes, fewer workers, or a larger machine."
    if isinstance(error, RecursionError):
        return f"A file or value is nested too deeply to be read ({place_of(error)}). Correct or remove it."
    if isinstance(error, UnicodeDecodeError):
        around = error.object[max(0, error.start - 20) : error.end + 20]
        return f"A file is not {error.encoding} text: byte {error.start}, near {around!r}. Convert it to UTF-8."
    if isinstance(error, OSError):
        return _paragraph_of_system(error)
    return None


def _paragraph_of_system(error: OSError) -> str | None:
    if error.errno is None or (error.filename is None and error.errno not in _OF_THE_MACHINE):
        return one_line(error)[:600] if error.errno is None and error.args else None
    names = " and ".join(str(os.fspath(name)) if not isinstance(name, int) else f"descriptor {name}"
                         for name in (error.filename, error.filename2) if name is not None)  # fmt: skip
    reason = " ".join(str(error.strerror or error).split())
    advice = ADVICE.get(error.errno, "correct that, or name another")
    return f"{names or 'The system'}: {reason}. {advice[0].upper()}{advice[1:]}."


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory: it has no exception for the CPU's memory, and this package does not import torch."""
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def place_of(error: BaseException) -> str:
    """The function, file and line that raised an error."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    return (
        f"in {frames[0].name}, {Path(frames[0].filename).name}:{frames[0].lineno}" if frames else "at an unknown place"
    )


def code_without_traceback(error: BaseException) -> int:
    """Print the paragraph about an error and return the exit code. Raises the error again if it is a bug."""
    if isinstance(error, KeyboardInterrupt):
        print("Stopped.", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError) and error.filename is None:
        close_unread_output()
        return EXIT_NO_READER
    if (paragraph := paragraph_of(error)) is None:
        raise error
    let_first_rank_print()
    print(f"error: {paragraph}", file=sys.stderr, flush=True)
    return EXIT_USER


def let_first_rank_print() -> None:
    """On ranks other than the first of their host: give the launcher time to end this process.

    An error of a recipe or of the data is found on every rank. The first rank prints it and ends, and the launcher then ends
    the others before they print it as well. An error of this rank alone is printed after `FIRST_RANK_S`.
    """
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    if rank == "0" or is_verbose() or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of a training would wait for the end of a step
    time.sleep(FIRST_RANK_S)


def end_lines(*written: object, about: str = "", then: str = "") -> str:
    """How every command that writes something ends: `written: PATH, PATH (ABOUT)`, and `next: COMMAND` where there is one."""
    line = f"written: {', '.join(map(str, written))}" + (f" ({about})" if about else "")
    return f"{line}\nnext: {then}" if then else line


def close_unread_output() -> None:
    """Redirect stdout after its reader has ended (`| head`), so that its buffer raises no error when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def module_command(*words: object) -> str:
    """The shell command `python -m WORDS`, quoted, with the path of this Python if `python` is another one.

    It is `minilmv2 VERB` in an installed wheel, and where this process is that program.
    """
    is_checkout = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    if words[0] in VERB_PACKAGES and (not is_checkout or Path(sys.argv[0]).name == PROGRAM):
        with contextlib.suppress(FileNotFoundError):
            installed_program(PROGRAM)
            return f"{program_command(PROGRAM)} {shlex.join(map(str, words[1:]))}".rstrip()
    this, named = Path(sys.executable), shutil.which("python")
    # Two virtual environments may link to one binary, so the directories are compared as well.
    is_this = named is not None and Path(named).parent == this.parent and Path(named).resolve() == this.resolve()
    python = this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this
    return shlex.join(["python" if is_this else str(python), "-m", *map(str, words)])


def program_command(name: str) -> str:
    """The shell word for a program that a Python package installed: its name, or its path if the name starts another one."""
    try:
        program = Path(installed_program(name))
    except FileNotFoundError:
        return name
    named = shutil.which(name)
    is_this = named is not None and Path(named).resolve() == program.resolve()
    relative = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return name if is_this else shlex.quote(str(relative))


def installed_program(name: str) -> str:
    """Path of a program that a Python package installed: next to this Python, or else on PATH (`pip install --target`)."""
    beside = Path(sys.executable).with_name(name)
    if path := str(beside) if beside.is_file() else shutil.which(name):
        return path
    raise FileNotFoundError(
        f"The program `{name}` is neither in {beside.parent} nor on PATH. Install requirements.txt with this Python; "
        "after `pip install --target DIR`, add DIR/bin to PATH."
    )


def quiet_launcher() -> list[str]:
    """DeepSpeed's launcher, which prints only errors unless `MINILMV2_VERBOSE` asks for more."""
    return [installed_program("deepspeed"), *([] if is_verbose() else ["--quiet"])]


class CommandLine(argparse.ArgumentParser):
    """A parser that accepts options by their full names only, and prints the error before the usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        let_first_rank_print()
        print(f"error: {message}\n{self.format_usage()}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `-V` and `--version`, which prints the name and the version of this distribution and exits."""
    parser.add_argument("-V", "--version", action=_PrintVersion, help="print the distribution's name and version")


class _PrintVersion(argparse.Action):
    """As `action="version"`, but reads the package metadata only if the option is given, which is slow."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "nargs": 0, "default": argparse.SUPPRESS})

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        print(f"{DISTRIBUTION} {distribution_version()}")
        parser.exit()


def distribution_version() -> str:
    """The installed distribution's version, or the one in `pyproject.toml` of a checkout that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"])
