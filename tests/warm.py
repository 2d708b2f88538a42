"""Python processes without the seconds that importing takes: forks of one that has imported what they need.

`subprocess` starts `python -m MODULE ...`, also with `-P`, for one of `Warm.modules`, `python -u -c TEXT` and scripts
of `examples` through a warm process: a fork of this one from before any test, idle and without threads, which forks
what it is asked for. So does `multiprocessing` what it spawns, Ray's raylet its workers, and pytest-xdist those that
run tests, in which all is imported that was in the one which hands the tests out. With Linux's CLONE_PARENT that is a
child of the process that asked, as any that it starts: with the descriptors, the environment, the folder and the
session that it was given, the signals and the exit code of an interpreter, to be waited for, stopped and killed. Only
its modules are there already. Each child has a warm process of its own, for children of its own.

A test of what a new interpreter does asks for the fixture `new_interpreters`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib
import importlib.util
import io
import json
import logging
import multiprocessing.util
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from estune.children import die_with_thread
from tests.compiled import compile_once

MODULES = (
    *("estune.cli", "estune.pool.process", "estune.render", "estune.study.jobs", "tests.runs", "tests.servers"),
    *("bench.gpu.weights", "bench.gpu.training", "bench.gpu.engine"),
    *(["ipykernel_launcher"] if importlib.util.find_spec("ipykernel") else []),  # which vLLM's environment lacks
)
if find_spec("openai"):
    MODULES = (*MODULES, "openai")
if find_spec("trl"):
    MODULES = (*MODULES, "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")
EXAMPLES = Path(__file__).parents[1] / "examples"
WARM = "ESTUNE_TESTS_WARM"  # in the environment: the descriptor at which Ray's workers are asked for
NAME = b"warm"  # of the process, by which those who count children know it

_CLONE_PARENT, _PR_SET_NAME = 0x8000, 15  # linux/sched.h, linux/prctl.h
_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())  # the system call's number
_LONGEST = 1 << 20  # bytes of a request: arguments and environment
execute_cold = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_spawn = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]
_unfreeze = gc.unfreeze

POSSIBLE = sys.platform == "linux" and _CLONE is not None


def start(*more: str) -> None:
    """Have the modules of `MODULES`, and more, and from now on start children of them warm.

    Not within an import: it would be going on in all children. pytest-xdist's processes have this from their first one.
    """
    if not POSSIBLE or Warm.is_there():
        return
    Warm.modules = (*MODULES, *more)
    gc.disable()  # what is imported stays, and would be gone through again and again
    with _without_ray():
        for module in Warm.modules:
            importlib.import_module(module)
    compile_once()
    _run_once()
    gc.collect()
    gc.freeze()  # collections need not look at all that has been imported, here and in every child
    gc.enable()
    atexit.register(_unfreeze)
    subprocess.Popen._execute_child = execute  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = spawn  # type: ignore[attr-defined]
    Warm.start()


@contextlib.contextmanager
def _without_ray() -> Iterator[None]:
    """Who can do without Ray does, as vLLM: Ray takes settings from the environment when a worker imports it."""
    assert "ray" not in sys.modules
    sys.modules["ray"] = None  # type: ignore[assignment]
    yield
    del sys.modules["ray"]


@functools.cache
def _run_once() -> None:
    """A run of one step: what runs import and compile is there, and on disk for those that are not warm.

    One process at a time, so that the second finds what the first has compiled.
    """
    from estune.config import Config
    from estune.run.trainer import Trainer

    small: dict[str, Any] = {"steps": 1, "population": 2, "prompts_per_step": 2, "max_new_tokens": 2, "eval_steps": 0}
    compiled = Path(os.environ["NUMBA_CACHE_DIR"])
    compiled.mkdir(parents=True, exist_ok=True)
    with (compiled / "lock").open("w") as lock, tempfile.TemporaryDirectory() as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = Config(output_dir=Path(folder, "run"), replicas=1, report_to=["tensorboard"], **small)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            Trainer(config).train()


class Warm:
    """The warm process of this one."""

    modules: tuple[str, ...] = ()
    _socket: socket.socket | None = None
    _lock = threading.Lock()

    @classmethod
    def is_there(cls) -> bool:
        """Whether it has been forked."""
        return cls._socket is not None

    @classmethod
    def start(cls) -> None:
        """Fork it, before there is anything that a child should not have."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
        if os.fork() == 0:
            try:
                ours.close()
                _serve(theirs)
            finally:
                os._exit(1)
        theirs.close()
        cls._socket, cls._lock = ours, threading.Lock()

    @classmethod
    def fork(cls, request: dict[str, Any], descriptors: list[int]) -> int:
        """Have a child forked; its process id."""
        with cls._lock:
            assert cls._socket is not None
            socket.send_fds(cls._socket, [json.dumps(request).encode()], descriptors)
            return int(cls._socket.recv(32))


class Closing(NamedTuple):
    """A `preexec_fn` that leaves the child without one of its three streams."""

    fd: int

    def __call__(self) -> None:
        os.close(self.fd)


def execute(self: Any, args: Any, executable: Any, preexec_fn: Any, close_fds: bool, *rest: Any) -> None:
    """`subprocess.Popen._execute_child`, but for what a warm process can start."""
    pass_fds, cwd, env, _, _, shell, *pipes, _, _, _, _, _, new_session, group = rest
    closed = {preexec_fn.fd} if isinstance(preexec_fn, Closing) else set()
    command = list(args)
    raylet = [os.path.basename(str(each)) for each in command[:1]] == ["raylet"]
    plain = not shell and executable is None and bool(closed or raylet or not preexec_fn) and close_fds and group == -1
    safe_path = command[1:2] == ["-P"]
    if safe_path:
        del command[1]
    python = _forked_python([os.fspath(each) for each in command[1:]]) if command[:1] == [sys.executable] else None
    if not (plain and (python or raylet)):
        execute_cold(self, args, executable, preexec_fn, close_fds, *rest)
        return
    stdin, _, _, stdout, _, stderr = pipes
    streams = {number: fd if fd >= 0 else number for number, fd in enumerate((stdin, stdout, stderr))}
    given = {number: fd for number, fd in streams.items() if number not in closed} | {fd: fd for fd in pass_fds}
    request = {
        "arguments": python or ["raylet", *with_warm_workers(command)],
        "environment": dict(os.environ if env is None else env),
        "folder": os.fspath(cwd or os.getcwd()),
        "session": bool(new_session),
        "safe_path": safe_path,
        "descriptors": list(given),
    }
    self.pid = Warm.fork(request, list(given.values()))
    self._child_created = True
    self._close_pipe_fds(*pipes)


def _forked_python(arguments: list[str]) -> list[str] | None:
    """What `_become` takes for a Python with these arguments, None if a warm process cannot be it."""
    match arguments:
        case ["-m", module, *_] if module in Warm.modules:
            return arguments
        case ["-u", "-c", *_]:  # as pytest-xdist starts its own
            return arguments[1:]
        case [script, *_] if Path(script).parent == EXAMPLES:
            return ["", *arguments]
        case _:
            return None


def with_warm_workers(command: list[str]) -> list[str]:
    """A raylet's command line, with `tests/warm_worker.py` for the Python that runs its workers."""
    python = f"--python_worker_command={sys.executable} "
    launcher = f"{python}-IS {Path(__file__).with_name('warm_worker.py')} "
    return [launcher + each.removeprefix(python) if each.startswith(python) else each for each in command]


def spawn(path: str, arguments: list[str], passed: list[int]) -> int:
    """`multiprocessing.util.spawnv_passfds`, but for what a warm process can start."""
    if arguments[1:2] != ["-c"] or "spawn_main" not in arguments[2]:
        return int(_spawn(path, arguments, passed))
    request = {
        "arguments": arguments[1:],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "session": False,
        "safe_path": False,
        "descriptors": [0, 1, 2, *passed],
    }
    return Warm.fork(request, [0, 1, 2, *passed])


def _serve(requests: socket.socket) -> NoReturn:
    """Fork what is asked for, until nobody can ask any more."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, NAME)
    die_with_thread()
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    _close_all_but(requests.fileno(), 0, 1, 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # which a group's others may live on after
        signal.signal(number, signal.SIG_IGN)
    while True:
        asked, descriptors, _, _ = socket.recv_fds(requests, _LONGEST, 64)
        if not asked:
            os._exit(0)
        waiting, placed = os.pipe()
        child = _fork_as_parent()
        if child == 0:
            requests.close()
            _become(json.loads(asked), descriptors, placed)
        os.close(placed)
        os.read(waiting, 1)  # who asked may kill the child's group, which must not be its own any more
        for fd in (waiting, *descriptors):
            os.close(fd)
        requests.send(b"%d" % child)


def _fork_as_parent() -> int:
    """As `os.fork`, but the child is one of this process's parent."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    flags = _CLONE_PARENT | signal.SIGCHLD
    child: int = ctypes.PyDLL(None).syscall(ctypes.c_long(_CLONE), ctypes.c_ulong(flags), None, None, None, None)
    if child == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    return child


def _become(request: dict[str, Any], descriptors: list[int], placed: int) -> NoReturn:
    """Be the interpreter of `python -m MODULE ...` or `python -c TEXT ...`, to its end.

    `placed` is a pipe that is written to once this is in its session and group.
    """
    code: int | None = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"python")
        if request["session"]:
            os.setsid()
        if request.get("group"):
            os.setpgid(0, 0)
        os.write(placed, b".")
        Warm.start()  # in this group, as its own children are to be
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        _take(dict(zip(request["descriptors"], descriptors, strict=True)))
        _forget_parent()
        kind, program, *arguments = request["arguments"]
        if kind == "raylet":
            _be_raylet([program, *arguments])
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [place for place in places if place and place not in sys.path]
        if not request["safe_path"]:
            sys.path.insert(0, os.getcwd())
        sys.argv = [kind or program, *arguments]
        code = _exit_code(kind, program)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        if code is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code or 0)


def _be_raylet(command: list[str]) -> NoReturn:
    """Be Ray's process that starts workers; this one's warm process is its child, and what that forks are as well."""
    assert Warm._socket is not None
    Warm._socket.set_inheritable(True)
    os.environ[WARM] = str(Warm._socket.fileno())
    die_with_thread()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.execv(command[0], command)


def _take(descriptors: dict[int, int]) -> None:
    """Have descriptors at their numbers, and no others; streams of Python's own at the first three."""
    assert Warm._socket is not None
    Warm._socket = _moved(Warm._socket, 1 + max([*descriptors, *descriptors.values(), Warm._socket.fileno()]))
    start = 1 + max([Warm._socket.fileno(), *descriptors])
    high = {number: _duplicate(fd, start) for number, fd in descriptors.items()}  # none in the place of another
    for number, fd in high.items():
        os.dup2(fd, number)
    _close_all_but(Warm._socket.fileno(), *descriptors)
    sys.stdin = sys.__stdin__ = _text(0, "r") if 0 in descriptors else None  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "w") if 1 in descriptors else None  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "w", "backslashreplace") if 2 in descriptors else None  # type: ignore[misc]


def _moved(end: socket.socket, least: int) -> socket.socket:
    return socket.socket(fileno=_duplicate(end.detach(), least))


def _duplicate(fd: int, least: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)


def _close_all_but(*wanted: int) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in wanted:
            with contextlib.suppress(OSError):  # the descriptor with which the folder was read
                os.close(fd)


def _text(fd: int, mode: str, errors: str = "strict") -> io.TextIOWrapper:
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    stream = open(fd, f"{mode}b", closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(stream, encoding=encoding, errors=errors, line_buffering=mode == "w")


def _forget_parent() -> None:
    """Undo what pytest has set."""
    atexit._clear()
    faulthandler.disable()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    sys.unraisablehook = sys.__unraisablehook__
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for logger in logging.root.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # of `runpy`: it is, here


def _exit_code(kind: str, program: str) -> int | None:
    """Run a program, a module after `-m`, a text after `-c` or a file; its exit code, None where the interpreter would
    end by SIGINT.
    """
    try:
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif kind == "":
            runpy.run_path(program, run_name="__main__")
        else:
            exec(program, {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return None
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
