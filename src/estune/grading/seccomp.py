"""Filters of system calls (Linux's seccomp), for what neither limits on a process nor namespaces hold.

These are memory that is no process's own (System V's shared memory, queues and semaphores, memfd, what io_uring and the
key rings hold, pages in pipes), and doors to other processes and to parts of the kernel that no program here needs.
The numbers are those of the kernel's tables for x86-64 and arm64 (arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h); what is newer than Linux 6.6 does not exist behind a filter.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from collections.abc import Iterable

from estune.grading.jail import confine

_Call = tuple[int, int | None]

# Name: number on x86-64, number on arm64 (None: not there).
_SHARED_MEMORY: dict[str, _Call] = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "vmsplice": (278, 75),
}
_DOORS: dict[str, _Call] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "modify_ldt": (154, None),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_FORKS = ((57, None), (58, None))
_SOCKET = (41, 198)
_SOCKETPAIR = (53, 199)
_SETSOCKOPT = (54, 208)
_PRCTL = (157, 167)
_PRLIMIT = (302, 261)
_FCNTL = (72, 25)
_NEWEST = 452  # fchmodat2, of Linux 6.6; above it also lie the numbers of the x32 interface, from 1 << 30

# linux/audit.h; the place is that in the pairs above
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# linux/sched.h: mount, cgroup, UTS, IPC, user, PID and network namespaces
_CLONE_THREAD = 0x10000
_CLONE_NEW = 0x7E020000
_AF_UNIX = 1
_AF_INET = 2
_AF_INET6 = 10
_PR_SET_PDEATHSIG = 1
_F_SETPIPE_SZ = 1031
_SO_SNDBUF = 7

# linux/bpf_common.h, linux/seccomp.h
_LOAD = 0x20
_EQUAL = 0x15
_AT_LEAST = 0x35
_ANY_BIT = 0x45
_RETURN = 0x06
_NUMBER = 0
_ARCHITECTURE = 4
_ARGUMENTS = 16
_KILL = 0x80000000
_ERRNO = 0x00050000
_ALLOW = 0x7FFF0000


def program_filter(processes: int) -> bytes | None:
    """The filter for a program in the sandbox; with one process, only threads can be started.

    Returns:
        Instructions for `jail.confine`; None on a system or a processor for which there are none.
    """
    machine = _machine()
    if machine is None:
        return None
    which = machine[1]
    code = _refuse([*_SHARED_MEMORY.values(), *_DOORS.values()], which)
    # The C library then takes clone, whose flags a filter can read.
    code += _refuse([_CLONE3], which, errno.ENOSYS)
    new_process = [_jump(_ANY_BIT, _CLONE_THREAD, 1, 0), _fail(errno.EPERM)] if processes == 1 else []
    if processes == 1:
        code += _refuse(_FORKS, which)
    code += _rule(_CLONE, which, 0, [*new_process, _jump(_ANY_BIT, _CLONE_NEW, 0, 1), _fail(errno.EPERM)])
    known = [_jump(_EQUAL, family, 3 - i, 0) for i, family in enumerate((_AF_UNIX, _AF_INET, _AF_INET6))]
    for call in (_SOCKET, _SOCKETPAIR):
        code += _rule(call, which, 0, [*known, _fail(errno.EAFNOSUPPORT)])
    # It must end with its keeper, may look at no other's limits, and its pipes and sockets stay small.
    code += _rule(_PRCTL, which, 0, [_jump(_EQUAL, _PR_SET_PDEATHSIG, 0, 1), _fail(errno.EPERM)])
    code += _rule(_PRLIMIT, which, 0, [_jump(_EQUAL, 0, 1, 0), _fail(errno.EPERM)])
    code += _rule(_FCNTL, which, 1, [_jump(_EQUAL, _F_SETPIPE_SZ, 0, 1), _fail(errno.EPERM)])
    code += _rule(_SETSOCKOPT, which, 2, [_jump(_EQUAL, _SO_SNDBUF, 0, 1), _fail(errno.EPERM)])
    return _filter(machine[0], code)


def deny_shared_memory() -> bool:
    """Refuse this process, and all that it starts, memory that no limit on a process counts; for good.

    For a process that runs under `RLIMIT_AS` or `RLIMIT_DATA`. Privileges can then no longer be had through `execve`.

    Returns:
        Whether it is refused from now on: only on Linux on x86-64 and arm64.
    """
    machine = _machine()
    if machine is None:
        return False
    confine(_filter(machine[0], _refuse(_SHARED_MEMORY.values(), machine[1])))
    return True


def _machine() -> tuple[int, int] | None:
    return _MACHINES.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None


def _filter(architecture: int, code: list[bytes]) -> bytes:
    """Another architecture's calls (32 bits) kill; calls newer than the list are not there; then the rules."""
    head = [
        _instruction(_LOAD, 0, 0, _ARCHITECTURE),
        _jump(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, 0, 0, _KILL),
        _instruction(_LOAD, 0, 0, _NUMBER),
        _jump(_AT_LEAST, _NEWEST + 1, 0, 1),
        _fail(errno.ENOSYS),
    ]
    return b"".join([*head, *code, _allow()])


def _refuse(calls: Iterable[_Call], which: int, error: int = errno.EPERM) -> list[bytes]:
    numbers = [number for call in calls if (number := call[which]) is not None]
    return [line for number in numbers for line in (_jump(_EQUAL, number, 0, 1), _fail(error))]


def _rule(call: tuple[int, int], which: int, argument: int, test: list[bytes]) -> list[bytes]:
    """The rule for one call: load the lower half of an argument, which is all that the kernel uses, and test it."""
    inside = [_instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *test, _allow()]
    return [_jump(_EQUAL, call[which], 0, len(inside)), *inside]


def _jump(test: int, value: int, then: int, otherwise: int) -> bytes:
    """Skip so many instructions, as the loaded number compares with the value."""
    return _instruction(test, then, otherwise, value)


def _fail(error: int) -> bytes:
    return _instruction(_RETURN, 0, 0, _ERRNO | error)


def _allow() -> bytes:
    return _instruction(_RETURN, 0, 0, _ALLOW)


def _instruction(code: int, then: int, otherwise: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
