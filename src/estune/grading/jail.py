"""What runs a program that nobody has read: a keeper, started by `sandbox.py` with `python -I -S jail.py`.

It reads a job as JSON from standard input and writes an outcome as JSON to standard output. On Linux it first goes into
new user (unless it is root), mount, network, IPC and host-name namespaces, and starts the program as the first process
of a new PID namespace, in which the keeper has no number: no signal, limit or debugger reaches it. What the program
sees of the disk is a new root: the system's libraries and this Python, read-only, and an empty folder to work in. It
runs as a user that owns nothing, under resource limits and a filter of system calls, and all that it started dies with
it.

The standard library only, and no import from estune: it must start fast and with nothing in its memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # not typing's, whose import takes a tenth of a start
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# linux/sched.h, linux/mount.h, linux/prctl.h
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000  # mount, IPC, UTS, PID, network
_NEW_USER = 0x10000000
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_READ_ONLY = 1
_NO_SUID = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_FILTER = 2

_SHOWN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
# The new root is mounted over a folder that every Linux has, so that there is none to make and to leave behind.
_ROOT = "/proc"
_NOBODY = 65534
_THREADS = 8
_SIGNALS = 256
_INODES = 4096
_POLL_SECONDS = 0.02

# Runs in the program's process, from a function, so that `__main__` shows nothing of it. The job comes on a descriptor
# that it closes. Results go to the real standard output, a line for each. Of sealed tests these are values, which stand
# for nothing but themselves. That another test passed is told with a secret, which the program does not know unless it
# searches the frames or the memory of its own process. Of an object of a subclass, what the base holds is sent.
_HARNESS = """
def run():
    import _sitebuiltins, builtins, json, os, sys
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "")
    sys.path += job["path"]
    sys.argv[:] = ["program.py"]
    if job["tests"]:
        report = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def plain(value):
        if value is None or value is True or value is False:
            return value
        if isinstance(value, int):
            value = int.__index__(value)
            return value if value.bit_length() < 10_000 else {"int": hex(value)}
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, complex):
            value = complex.__pos__(value)
            return {"complex": [value.real, value.imag]}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes):
            return {"bytes": bytes.decode(value, "latin-1")}
        if isinstance(value, dict):
            return {"dict": [[plain(key), plain(item)] for key, item in dict.items(value)]}
        if isinstance(value, list):
            return [plain(item) for item in list.__iter__(value)]
        for kind in (tuple, set, frozenset):
            if isinstance(value, kind):
                return {kind.__name__: [plain(item) for item in kind.__iter__(value)]}
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return plain(value.item())
        return {"other": None}

    def tell(text):
        os.write(report, f"{text}\\n".encode())

    def seal(number, test):
        scope = dict(names) if test["apart"] else names
        for text, slot in test["steps"]:
            if slot is None:
                exec(compile(text, f"test {number}", "exec"), scope)
            else:
                value = json.dumps([number, slot, plain(eval(compile(text, f"test {number}", "eval"), scope))])
                tell(value if len(value) <= job["output"] else json.dumps([number, slot, {"other": None}]))

    names = {"__name__": "program" if job["tests"] else "__main__"}
    exec(compile(job["program"], "program.py", "exec"), names)
    error = None
    for number, test in enumerate(job["tests"]):
        try:
            if isinstance(test, dict):
                seal(number, test)
            else:
                exec(compile(test, f"test {number}", "exec"), names)
                tell(f"{job['secret']} {number}")
        except Exception as caught:
            error = error or caught
    if error:
        raise error

run()
"""


class Unavailable(Exception):
    """This machine does not allow the isolation."""


class Running:
    """A program that has been started."""

    def __init__(self, pid: int, began: float, files: dict[str, Any], job: int) -> None:
        self.pid = pid
        self.began = began
        self.files = files  # its standard input, output and error
        self.job = job  # descriptor of the pipe on which it waits for its job


class Over(Exception):
    """The program has used too much of what the text names: `timeout` or `memory`."""


def main() -> None:
    """Run the job on standard input."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # else it would wake nobody
    job = json.load(sys.stdin)
    try:
        # Of the keeper's own processes, for what the program holds; it is hidden below.
        job["proc"] = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if sys.platform == "linux" else None
        if job["namespaces"]:
            _unshare(libc)
            _new_root(libc, job)
        running = _start(libc, job)
    except Unavailable as error:
        told = json.dumps({"status": "unavailable", "stderr": str(error)})
    except BaseException as error:
        told = json.dumps({"status": "unavailable", "stderr": f"{type(error).__name__}: {error}"})
    else:
        try:
            told = json.dumps(_outcome(running, job))
        except BaseException as error:  # the program may be the cause: what fails now is no fault of the system
            told = json.dumps({"status": "died", "stderr": f"the keeper died: {type(error).__name__}: {error}"})
    sys.stdout.write(told)


def confine(code: bytes) -> None:
    """Put a filter of system calls on this process and all that it starts, for good. Linux only.

    Args:
        code: instructions of seccomp's kind, 8 bytes each.

    Raises:
        OSError: the kernel does not take it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    text = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(text))
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def _unshare(libc: Any) -> None:
    user = os.getuid()
    group = os.getgid()
    # As root, no user namespace: the limit on processes does not bind root, under whatever name.
    if libc.unshare(_NEW_NAMESPACES | (_NEW_USER if user else 0)) != 0:
        raise Unavailable(f"unshare: {os.strerror(ctypes.get_errno())}")
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{_NOBODY} {user} 1"),
            ("gid_map", f"{_NOBODY} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _new_root(libc: Any, job: dict[str, Any]) -> None:
    """Make a small system, for this mount namespace alone."""

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        texts = [text.encode() if text is not None else None for text in (source, target, kind)]
        if libc.mount(*texts, ctypes.c_ulong(flags), options.encode() if options else None) != 0:
            raise Unavailable(f"mount {target}: {os.strerror(ctypes.get_errno())}")

    def attributes(target: str, setting: int, clearing: int, flags: int) -> None:
        numbers = (ctypes.c_uint64 * 4)(setting, clearing, 0, 0)
        if libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, numbers, 32) != 0:
            raise Unavailable(f"mount_setattr {target}: {os.strerror(ctypes.get_errno())} (it needs Linux 5.12)")

    def show(path: str, inside: str) -> None:
        if not os.path.exists(path) or os.path.lexists(inside):
            return  # not on this system, or in what is already shown
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            return
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT))
        mount(path, inside, None, _MS_BIND | _MS_REC)

    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size=1m,nr_inodes={_INODES},mode=755")
    os.mkdir(f"{_ROOT}/empty")
    os.mkdir(f"{_ROOT}/tmp")
    mount("tmpfs", f"{_ROOT}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={job['disk']},nr_inodes={_INODES},mode=1777")
    # After /tmp, as Python itself may lie below it.
    for path in sorted({*_SHOWN, os.path.realpath(sys.base_prefix), sys.base_prefix}):
        show(path, _ROOT + path)
    for path in job["hidden"]:
        if os.path.isdir(_ROOT + path):
            mount(f"{_ROOT}/empty", _ROOT + path, None, _MS_BIND)
    for path in job["packages"]:
        show(path, f"{_ROOT}/packages/{os.path.basename(path)}")
    attributes(_ROOT, _READ_ONLY | _NO_SUID, 0, _AT_RECURSIVE)
    attributes(f"{_ROOT}/tmp", 0, _READ_ONLY, 0)


def _start(libc: Any, job: dict[str, Any]) -> Running:
    """Start the program's process, up to where Python begins in it."""
    where = f"{_ROOT}/tmp" if job["namespaces"] else job["folder"]
    files = {name: _scratch(f"{where}/.{name}") for name in ("in", "out", "err")}
    files["in"].write(job["stdin"].encode(errors="replace"))
    files["in"].seek(0)
    reading, writing = os.pipe()
    failing, failed = os.pipe()
    began = time.monotonic()
    # As root, a user of its own, so that no other sandbox's processes count. An id that a container's range holds.
    user = 50_000 + os.getpid() % 10_000
    program = os.fork()
    if program == 0:
        _become(libc, job, files, user, reading, failed)
    os.close(reading)
    os.close(failed)
    with os.fdopen(failing) as pipe:
        if failure := pipe.read():  # it ends when Python starts
            raise Unavailable(failure)
    return Running(program, began, files, writing)


def _outcome(running: Running, job: dict[str, Any]) -> dict[str, Any]:
    """Give the program its job, wait for it until the deadline, and say what came of it."""
    names = ("program", "tests", "secret", "path", "output")
    try:
        with os.fdopen(running.job, "w") as pipe:
            json.dump({name: job[name] for name in names}, pipe)
    except BrokenPipeError:
        pass  # one that ends early says how
    code: int | None = None
    status = "ended"
    try:
        code = _wait(running.pid, job, running.began + job["wall"])
    except Over as over:
        status = str(over)
    finally:
        _end(running.pid, job["namespaces"], code is None)
    size = job["output"] * (1 + sum(1 if isinstance(test, str) else len(test["steps"]) for test in job["tests"]))
    return {
        "status": status,
        "code": code,
        "stdout": _read(running.files["out"], size),
        "stderr": _read(running.files["err"], job["output"]),
        "seconds": time.monotonic() - running.began,
    }


def _become(libc: Any, job: dict[str, Any], files: dict[str, Any], user: int, reading: int, failed: int) -> None:
    """In the program's process: give everything up, then run Python with the harness."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.dup2(files["in"].fileno(), 0)
        os.dup2(files["out"].fileno(), 1)
        os.dup2(files["err"].fileno(), 2)
        os.set_inheritable(reading, True)
        processes = job["processes"]
        # Equal parts of the memory, so that all together have no more, however fast they are.
        space = job["memory"] // processes
        limits = {"CPU": job["cpu"], "FSIZE": job["disk"], "NOFILE": 64, "CORE": 0, "AS": space}
        if sys.platform == "linux":
            limits["SIGPENDING"] = _SIGNALS  # and timers, which the kernel keeps
        if job["namespaces"]:
            limits["NPROC"] = _THREADS if processes == 1 else processes  # elsewhere all of the user's would count
            # In a chroot the kernel refuses further user namespaces, through which privileges could be had again.
            os.chroot(_ROOT)
            os.chdir("/tmp")
        else:
            os.chdir(job["folder"])
        if job["namespaces"] and os.getuid() == 0:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        for name, limit in limits.items():
            which = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(which)[1]
            lower = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(which, (lower, lower))
        if sys.platform == "linux":
            # Nothing else ends it with its keeper. A change of user would clear this.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if job["filter"]:
            confine(bytes.fromhex(job["filter"]))
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        arguments = [job["python"], "-I", "-S", "-X", "utf8", "-c", _HARNESS, str(reading)]
        os.execve(job["python"], arguments, variables)
    except BaseException as error:
        os.write(failed, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(127)


def _wait(program: int, job: dict[str, Any], deadline: float) -> int:
    """Exit code of the program, negative for a signal.

    Raises:
        Over: its time is up, or its processes together hold more memory than they may.
    """

    awake, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)
    while True:
        pid, status = os.waitpid(program, os.WNOHANG)
        if pid == program:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            raise Over("timeout")
        if job["proc"] is not None and _held(job["proc"], program, job["processes"] > 1) > job["memory"]:
            raise Over("memory")
        if select.select([awake], [], [], _POLL_SECONDS)[0]:
            os.read(awake, 1)


def _held(proc: int, program: int, family: bool) -> int:
    """Bytes that a process (and its family) holds, with page tables, which no limit on address space counts."""
    total = 0
    for pid in _family(proc, program) if family else (program,):
        # A process chooses its name, of any bytes but line feeds, which the kernel escapes.
        for line in _content(proc, f"{pid}/status").split(b"\n"):
            if line.startswith((b"VmRSS:", b"VmSwap:", b"VmPTE:")):
                total += 1024 * int(line.split()[1])
    return total


def _family(proc: int, pid: int) -> Iterator[int]:
    """A process and its descendants. In namespaces, orphans are children of the first process."""
    yield pid
    try:
        tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except OSError:
        return
    try:
        threads = os.listdir(tasks)
    except OSError:
        return
    finally:
        os.close(tasks)
    for thread in threads:
        for child in _content(proc, f"{pid}/task/{thread}/children").split():
            yield from _family(proc, int(child))


def _content(proc: int, path: str) -> bytes:
    """The text of a file of /proc; empty if its process has ended."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY, dir_fd=proc), "rb") as file:
            return file.read()
    except OSError:
        return b""


def _end(program: int, namespaces: bool, running: bool) -> None:
    """Kill what the program left. In namespaces, all of it is dead once the first process is."""
    try:
        if not namespaces:
            os.killpg(program, signal.SIGKILL)
        elif running:
            os.kill(program, signal.SIGKILL)
    except ProcessLookupError:
        pass
    if running:
        os.waitpid(program, 0)


def _scratch(path: str) -> Any:
    """An open file without a name."""
    file = open(path, "w+b")  # noqa: SIM115
    os.unlink(path)
    return file


def _read(file: Any, limit: int) -> str:
    file.seek(0)
    text: str = file.read(limit).decode(errors="replace")
    return text


if __name__ == "__main__":
    main()
