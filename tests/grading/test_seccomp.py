"""Filters of system calls, run by an interpreter of their instructions, and by the kernel."""

from __future__ import annotations

import errno
import platform
import struct
import subprocess
import sys

import pytest

from estune.grading.seccomp import deny_shared_memory, program_filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
# By architecture: call, arguments (which of them, value), and the error; none for what is allowed.
CALLS: dict[str, list[tuple[int, dict[int, int], int | None]]] = {
    "x86_64": [
        (0, {}, None),  # read
        (9, {3: 0x22}, None),  # mmap
        (59, {}, None),  # execve
        (29, {}, errno.EPERM),  # shmget
        (319, {}, errno.EPERM),  # memfd_create
        (101, {}, errno.EPERM),  # ptrace
        (57, {}, errno.EPERM),  # fork
        (56, {0: 17}, errno.EPERM),  # clone: a process
        (56, {0: 0x3D0F00}, None),  # a thread
        (56, {0: 0x10000 | 0x10000000}, errno.EPERM),  # a thread in a new user namespace
        (435, {}, errno.ENOSYS),  # clone3
        (41, {0: 1}, None),  # socket: unix
        (41, {0: 2}, None),
        (41, {0: 10}, None),
        (41, {0: 40}, errno.EAFNOSUPPORT),  # vsock
        (53, {0: 16}, errno.EAFNOSUPPORT),  # socketpair
        (157, {0: 1}, errno.EPERM),  # prctl: no end with the parent
        (157, {0: 15}, None),
        (302, {0: 0}, None),  # prlimit64: its own
        (302, {0: 1}, errno.EPERM),
        (72, {1: 1031}, errno.EPERM),  # fcntl: a larger pipe
        (72, {1: 1, 0: 1031}, None),
        (54, {1: 1, 2: 7}, errno.EPERM),  # setsockopt: larger buffers
        (54, {1: 7, 2: 2}, None),
        (452, {}, None),
        (453, {}, errno.ENOSYS),
        (0x40000000, {}, errno.ENOSYS),
    ],
    "aarch64": [
        (63, {}, None),  # read
        (222, {}, None),  # mmap
        (221, {}, None),  # execve
        (194, {}, errno.EPERM),  # shmget
        (279, {}, errno.EPERM),  # memfd_create
        (117, {}, errno.EPERM),  # ptrace
        (220, {0: 17}, errno.EPERM),
        (220, {0: 0x3D0F00}, None),
        (198, {0: 1}, None),
        (198, {0: 38}, errno.EAFNOSUPPORT),
        (261, {0: 7}, errno.EPERM),
        (208, {2: 7}, errno.EPERM),
        (500, {}, errno.ENOSYS),
    ],
}


def verdict(code: bytes, architecture: int, number: int, arguments: dict[int, int]) -> int:
    """What the kernel does with a call: the five instructions that the filters are made of."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(arguments.get(i, 0) for i in range(6)))
    lines = list(struct.iter_unpack("=HBBI", code))
    at = loaded = 0
    while True:
        operation, then, otherwise, value = lines[at]
        at += 1
        if operation == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            holds = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[operation]
            at += then if holds else otherwise


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", "linux")
    code = program_filter(1)
    assert code is not None
    for number, arguments, error in CALLS[machine]:
        expected = ALLOW if error is None else 0x50000 | error
        assert verdict(code, ARCHITECTURES[machine], number, arguments) == expected, (number, arguments)
    assert verdict(code, 0x40000003, 20, {}) == KILL  # 32 bits
    several = program_filter(2)
    assert several is not None
    for number, arguments, _ in CALLS[machine]:
        if number in (56, 57, 58, 220) and arguments.get(0, 0) < 1 << 28:
            assert verdict(several, ARCHITECTURES[machine], number, arguments) == ALLOW


def test_there_is_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert program_filter(1) is None
    assert not deny_shared_memory()


@pytest.mark.skipif(program_filter(1) is None, reason="there is no filter here")
def test_no_shared_memory_in_a_process_that_denies_itself_such() -> None:
    program = """
import ctypes, mmap, os, subprocess, sys
from estune.grading.seccomp import deny_shared_memory
os.close(os.memfd_create("before"))
assert deny_shared_memory()
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0, 4096, 0o1600) == -1 and ctypes.get_errno() == 1
try: os.memfd_create("after")
except PermissionError: print(len(mmap.mmap(-1, 1 << 20)), subprocess.run(["true"]).returncode)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "1048576 0\n", done.stderr
