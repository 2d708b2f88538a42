"""What runs a program that nobody has read: a helper process, started by `sandbox.py` with `python -I -S jail.py`.

It reads a job as JSON from standard input and writes an outcome as JSON to standard output. On Linux it first goes into
new user (unless it is root), mount, PID, network, IPC and host-name namespaces. What the program sees of the disk is a
new root: the system's libraries and this Python, read-only, and an empty folder to work in. It runs as a user that owns
nothing, under resource limits, and all that it started dies with the namespace.

The standard library only, and no import from estune: it must start fast and with nothing in its memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from typing import Any

# linux/sched.h, linux/mount.h, linux/prctl.h
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x04000000 | 0x20000000 | 0x40000000  # mount, IPC, UTS, PID, network
_NEW_USER = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_RDONLY, _MS_REMOUNT = 2, 4, 4096, 16384, 1 << 18, 1, 32
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_SHOWN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
_NOBODY = 65534

# Runs in the program's process, from a function, so that `__main__` shows nothing of it. The job comes on a descriptor
# that it closes. How many tests passed goes to the real standard output, which the program finds only by trying
# descriptors, each with a secret that it does not know unless it searches the frames or the memory of its own process.
_HARNESS = """
def run():
    import json, os, sys
    with os.fdopen(int(sys.argv[1])) as file:
        job = json.load(file)
    secret = job.pop("secret")
    if job["tests"]:
        report = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    names = {"__name__": "program" if job["tests"] else "__main__"}
    exec(compile(job["program"], "program.py", "exec"), names)
    error = None
    for number, test in enumerate(job["tests"]):
        try:
            exec(compile(test, f"test {number}", "exec"), names)
        except Exception as caught:
            error = error or caught
        else:
            os.write(report, f"{secret} {number}\\n".encode())
    if error:
        raise error
    if job["tests"]:
        os.write(report, f"{secret} end\\n".encode())

run()
"""


class Unavailable(Exception):
    """This machine does not allow the isolation."""


def main() -> None:
    """Run the job on standard input."""
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    job = json.load(sys.stdin)
    try:
        if job["namespaces"]:
            _unshare(libc)
        reading, writing = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            _keep(libc, job, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            outcome = pipe.read()
        os.waitpid(keeper, 0)
    except Unavailable as error:
        outcome = json.dumps({"status": "unavailable", "stderr": str(error)})
    sys.stdout.write(outcome)


def _keep(libc: Any, job: dict[str, Any], writing: int) -> None:
    """As the first process of the namespace: run the program, reap what it leaves, tell the outcome, and end."""
    try:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if job["namespaces"]:
            _new_root(libc, job)
        outcome = _run(libc, job)
    except Unavailable as error:
        outcome = {"status": "unavailable", "stderr": str(error)}
    except BaseException as error:
        outcome = {"status": "unavailable", "stderr": f"{type(error).__name__}: {error}"}
    with os.fdopen(writing, "w") as pipe:
        json.dump(outcome, pipe)
    os._exit(0)


def _unshare(libc: Any) -> None:
    user, group = os.getuid(), os.getgid()
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
    """Make a small system over the job's folder, for this namespace alone, and the file system of this process."""
    root = job["folder"]

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        texts = [text.encode() if text is not None else None for text in (source, target, kind)]
        if libc.mount(*texts, ctypes.c_ulong(flags), options.encode() if options else None) != 0:
            raise Unavailable(f"mount {target}: {os.strerror(ctypes.get_errno())}")

    size = job["disk"]
    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    os.mkdir(root + "/tmp")
    mount("tmpfs", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},mode=1777")
    # After /tmp, as Python itself may lie below it.
    for path in sorted({*_SHOWN, os.path.realpath(sys.base_prefix), sys.base_prefix, sys.prefix, *job["visible"]}):
        inside = root + path
        if not os.path.exists(path) or os.path.lexists(inside):
            continue  # not on this system, or in what is already shown
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT))
        mount(path, inside, None, _MS_BIND | _MS_REC)
        # attr_set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
        attributes = (ctypes.c_uint64 * 4)(1 | 2, 0, 0, 0)
        if libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, inside.encode(), _AT_RECURSIVE, attributes, 32) != 0:
            raise Unavailable(f"mount_setattr {path}: {os.strerror(ctypes.get_errno())} (it needs Linux 5.12)")
    mount("none", root, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    # In a chroot the kernel refuses further user namespaces, through which privileges could be had again.
    os.chroot(root)
    os.chdir("/tmp")


def _run(libc: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Start the program, wait for it until the deadline, and say what came of it."""
    where = "/tmp" if job["namespaces"] else None
    files = {name: tempfile.TemporaryFile(dir=where) for name in ("in", "out", "err")}  # noqa: SIM115
    files["in"].write(job["stdin"].encode(errors="replace"))
    files["in"].seek(0)
    reading, writing = os.pipe()
    began = time.monotonic()
    program = os.fork()
    if program == 0:
        os.close(writing)
        _become(libc, job, files, reading)
    os.close(reading)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "w") as pipe:  # one that ends early says how
        json.dump({key: job[key] for key in ("program", "tests", "secret")}, pipe)
    code = _wait(program, began + job["wall"])
    if not job["namespaces"]:
        _kill_group(program)
    texts = {name: _read(files[name], job["output"]) for name in ("out", "err")}
    return {
        "status": "timeout" if code is None else "ended",
        "code": code,
        "stdout": texts["out"],
        "stderr": texts["err"],
        "seconds": time.monotonic() - began,
    }


def _become(libc: Any, job: dict[str, Any], files: dict[str, Any], reading: int) -> None:
    """In the program's process: give everything up, then run Python with the harness."""
    try:
        os.setsid()
        os.dup2(files["in"].fileno(), 0)
        os.dup2(files["out"].fileno(), 1)
        os.dup2(files["err"].fileno(), 2)
        os.set_inheritable(reading, True)
        limits = {"CPU": job["cpu"], "FSIZE": job["disk"], "NOFILE": 64, "CORE": 0, "AS": job["memory"]}
        if job["namespaces"]:
            limits["NPROC"] = job["processes"]  # elsewhere it would count all processes of the user
        else:
            os.chdir(job["folder"])
        if job["namespaces"] and os.getuid() == 0:
            # A user of its own, so that no other sandbox's processes count. An id that a container's range holds.
            user = random.randrange(50_000, 60_000)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        for name, limit in limits.items():
            which = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(which)[1]
            # Some seconds of CPU between the signal that can be caught and the one that cannot.
            highest = limit + 2 if name == "CPU" else limit
            if hard != resource.RLIM_INFINITY:
                limit, highest = min(limit, hard), min(highest, hard)  # noqa: PLW2901
            resource.setrlimit(which, (limit, highest))
        if sys.platform == "linux":
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            # Without namespaces nothing else ends it with whoever waits for it. A change of user would clear this.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        variables = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-I", "-X", "utf8", "-c", _HARNESS, str(reading)]
        os.execve(sys.executable, arguments, variables)
    except BaseException as error:
        os.write(2, f"the sandbox failed: {error}".encode())
        os._exit(127)


def _wait(program: int, deadline: float) -> int | None:
    """Exit code of the program, negative for a signal; None if it did not end in time. Reaps orphans on the way."""
    pause = 0.001
    while time.monotonic() < deadline:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == program:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    return None


def _kill_group(program: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program, signal.SIGKILL)


def _read(file: Any, limit: int) -> str:
    file.seek(0)
    text: str = file.read(limit).decode(errors="replace")
    return text


if __name__ == "__main__":
    main()
