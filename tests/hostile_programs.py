"""Programs that reach for more memory than they may have, for their keeper, or for the pass of a test."""

from __future__ import annotations

_HEAD = """
import ctypes, fcntl, mmap, os, socket, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.shmat.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
M = 1 << 20
held = 0

def fill(out):
    global held
    os.set_blocking(out.fileno(), False)
    try:
        out.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
    except OSError:
        pass
    try:
        while True:
            held += out.send(b"x" * 4096)
    except BlockingIOError:
        pass

def tables(touch):
    for i in range(65_000):  # two pages on either side of a border between tables of every level
        start = libc.mmap((1 << 32) + i * (1 << 30) - 4096, 8192, 3, 0x100022, -1, 0)
        if start is None or start == 2**64 - 1:
            break
        touch(start)
        touch(start + 4096)
    time.sleep(1)  # the keeper looks fifty times a second, on a machine that has time for it
"""

# Each prints at its end how many MiB it holds beyond its own address space (and page tables), if any.
MEMORY = {
    "System V's shared memory": """
for _ in range(64):
    number = libc.shmget(0, 16 * M, 0o1600)
    if number < 0:
        break
    start = libc.shmat(number, None, 0)
    ctypes.memset(start, 1, 16 * M)
    libc.shmdt(ctypes.c_void_p(start))
    held += 16 * M
""",
    "memfd": """
try:
    file = os.memfd_create("x")
    for _ in range(8):
        held += os.write(file, bytes(M))
except OSError:
    pass
""",
    "queues and semaphores": """
for call, size in ((libc.msgget, 16_384), (lambda key, flags: libc.semget(key, 30_000, flags), 30_000 * 64)):
    while call(0, 0o1600) >= 0 and held < 256 * M:
        held += size
""",
    "io_uring, bpf, keys": """
for number, arguments in ((425, (4096, bytes(200))), (321, (0, bytes(200), 200)), (248, (b"user", b"x", b"y", 1, -3))):
    if libc.syscall(number, *arguments) >= 0:
        held += 256 * M
""",
    "names of files": """
try:
    for i in range(100_000):
        open(f"{i}{'x' * 200}", "w").close()
        held += 1024 + 200
except OSError:
    pass
""",
    "pipes": """
keep = []
try:
    while True:
        keep.append(os.pipe())
        os.set_blocking(keep[-1][1], False)
        try:
            fcntl.fcntl(keep[-1][1], 1031, M)
        except OSError:
            pass
        try:
            while True:
                held += os.write(keep[-1][1], bytes(65_536))
        except BlockingIOError:
            pass
except OSError:
    pass
""",
    "pages in pipes": """
class Vector(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]
start = libc.mmap(None, 16 * M, 3, 0x22, -1, 0)
if libc.vmsplice(os.pipe()[1], ctypes.byref(Vector(start, 4096)), 1, 0) > 0:
    held += 256 * M
""",
    "sockets": """
keep = []
try:
    while True:
        keep += socket.socketpair()
        fill(keep[-1])
        fill(keep[-2])
except OSError:
    pass
""",
    "sockets on their way": """
import array
top = socket.socketpair()
try:
    for _ in range(2000):
        pair = socket.socketpair()
        fill(pair[0])
        fill(pair[1])
        files = array.array("i", [end.fileno() for end in pair])
        top[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        for end in pair:
            end.close()
except OSError:
    pass
""",
    "other families of sockets": """
for family in (16, 17, 38, 40):  # netlink, packet, crypto, vsock
    try:
        socket.socket(family, socket.SOCK_RAW if family < 20 else socket.SOCK_SEQPACKET if family == 38 else 1)
        held += 256 * M
    except OSError as error:
        assert error.errno in (94, 97), error
""",
    "timers": """
timer = ctypes.c_void_p()
while libc.timer_create(1, None, ctypes.byref(timer)) == 0 and held < 256 * M:
    held += 384
""",
    "page tables": "tables(lambda start: ctypes.memset(start, 1, 1))",
    "page tables of zeros": "tables(lambda start: ctypes.string_at(start, 1))",
    "processes": """
try:
    for _ in range(8):
        if os.fork() == 0:
            x = bytearray(30 * M)
            time.sleep(2)
            os._exit(0)
        held += 30 * M
except OSError:
    pass
""",
    "processes by other calls": """
for number, arguments in ((56, (17, 0, 0, 0, 0)), (58, ()), (435, (bytes(8) * 11, 88))):
    pid = libc.syscall(number, *arguments)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        held += 256 * M
""",
    "the other numbers of x86": """
if libc.syscall(0x40000000 + 319, b"x", 0) >= 0:
    held += 256 * M
""",
}
MEMORY = {name: f"{_HEAD}{program}\nprint(held / M)" for name, program in MEMORY.items()}

# Each tries to end, stop or outlive its keeper, and says when it is done.
KEEPER = {
    "signals": """
import os
for pid in (0, 1, -1, *range(2, 500)):
    for number in (9, 19):
        try: os.kill(pid, number)
        except OSError: pass
""",
    "limits": """
import os, resource
for pid in range(1, 500):
    try: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0))
    except OSError: pass
""",
    "limits by number": """
import ctypes
for pid in range(1, 500):
    ctypes.CDLL(None).syscall(302, pid, 0, (ctypes.c_ulong * 2)(0, 0), None)
""",
    "a debugger": """
import ctypes
assert not any(ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0 for pid in range(1, 500))
""",
    "no end with it": "import ctypes; assert ctypes.CDLL(None).prctl(1, 0) != 0",
    "its parent and group": """
import os
for pid in (os.getppid(), -os.getpgid(0)):
    try: os.kill(pid, 9)
    except OSError: pass
""",
    "many threads": """
import threading, time
try:
    for _ in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
    assert False
except RuntimeError: assert threading.active_count() <= 8
""",
}
# Were it not the first process of a namespace, these would hit those of whoever tests.
KEEPER = {name: f"import os\nassert os.getpid() == 1\n{program}\nprint('done')" for name, program in KEEPER.items()}

# Each wants `double(2) == 4000004` and `double(3) == 6000006` to hold, and never names either.
_FIND = """
import gc, os, sys
def things():
    frame = sys._getframe()
    while frame:
        yield from [frame.f_locals, frame.f_globals, frame.f_code]
        frame = frame.f_back
    yield from gc.get_objects()
"""
_WRITE = """
import os
def write(*lines):
    for fd in range(65):
        for line in lines:
            try: os.write(fd, f"\\n{line}\\n".encode())
            except OSError: pass
"""
FORGERIES = {
    "the secret, in frames": f"""{_FIND}{_WRITE}
def double(x):
    for thing in things():
        if isinstance(thing, dict) and "secret" in thing:
            write(*(f"{{thing['secret']}} {{n}}" for n in (0, 1, "end")))
""",
    "equal to everything": """
class All:
    __eq__ = __ge__ = __le__ = __lt__ = __gt__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __sub__ = __rsub__ = __abs__ = lambda self, *other: self
def double(x): return All()
""",
    "patched compile, exec and eval": """
import builtins
for name in ("compile", "exec", "eval", "isinstance", "len", "type"):
    setattr(builtins, name, lambda *_, **__: True)
""",
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit in a test": "def double(x): raise SystemExit(0)",
    "printed passes": """
import sys
for file in (sys.stdout, sys.stderr):
    print("passed\\nNone 0\\nNone 1\\n 0\\n 1\\ntrue\\n[0, 0, true]\\n[1, 0, true]", file=file, flush=True)
def double(x): return None
""",
    "an edited job": f"""{_FIND}
for thing in things():
    if isinstance(thing, dict) and "tests" in thing and "program" in thing:
        thing.update(secret="", tests=["pass", "pass"], output=0)
def double(x): return None
""",
    "constants that are read": f"""{_FIND}
import re
seen = set()
for thing in list(things()):
    seen |= set(map(int, re.findall(r"\\d{{7}}", repr(getattr(thing, "co_consts", thing)))))
for fd in range(3, 65):
    try: seen |= set(map(int, re.findall(rb"\\d{{7}}", os.pread(fd, 1 << 16, 0))))
    except OSError: pass
def double(x): return max(seen - {{4000000 + 9, 6000000 + 9}}, default=None) if x == 3 else min(seen, default=None)
""",
    "no assertions": """
import builtins
builtins.AssertionError = type("Never", (Exception,), {"__init__": lambda self, *_: None})
setattr(builtins, "__debug__", False)
""",
    "a hook at the end": f"""{_WRITE}
import atexit
atexit.register(write, "[0, 0, true]", "[1, 0, true]", "None 0", "None 1")
atexit.register(os._exit, 0)
def double(x): raise KeyboardInterrupt
""",
    "a number that lies": """
class Lie(int):
    __eq__ = __le__ = __ge__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __repr__ = __str__ = __format__ = lambda self, *_: "4000004"
    __index__ = __int__ = __abs__ = lambda self: 0
    __hash__ = lambda self: hash(4000004)
    __reduce__ = lambda self: (int, (4000004 - 0,))
    def __reduce__(self): return (eval, ("True",))
def double(x): return Lie(0)
""",
    "a text that lies": """
class Lie(str):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0
    __str__ = __repr__ = lambda self: "4000004"
def double(x): return Lie("")
""",
    "another json": """
import json, sys, types
fake = types.ModuleType("json")
fake.dumps = json.dumps = lambda value, **_: '[0, 0, true]\\\\n[1, 0, true]\\\\n[1, 0, {"any": 1}]'
json.encoder.JSONEncoder.encode = lambda self, value: "true"
sys.modules["json"] = fake
import __main__
__main__.json = fake
def double(x): return 0
""",
    "every descriptor": f"""{_WRITE}
write("[0, 0, true]", "[0, 0, [true]]", '[0, 0, {{"other": 0}}]', "[0, 0, NaN]", '[0, 0, {{"set": [1, 2]}}]', "null")
write("[0, 0, " + "[" * 20_000, '[0, 0, {{"int": "z"}}]', '[0, 0, {{"dict": [[[], 1]]}}]', "[[], {{}}, 1]", "[0, 0]")
write('[0, 0, {{"complex": [1]}}]', '[0, 0, {{"bytes": "\\u1234"}}]', '[0, 0, {{}}]', '[0, 0, {{"a": 1, "b": 2}}]')
write('[0, 0, {{"complex": [1' + "0" * 400 + ", 0]}}]")
def double(x): return None
""",
    "a thread that writes later": f"""{_WRITE}
import threading, time
def later():
    for _ in range(20):
        write("[0, 0, true]", "[1, 0, true]", "None 0", "None 1")
        time.sleep(0.005)
threading.Thread(target=later).start()
def double(x): time.sleep(0.02)
""",
    "another test's number": f"""{_WRITE}
def double(x):
    write(*(f"[{{n}}, {{m}}, {{x}}]" for n in (0, 1) for m in range(3)))
    return 1
""",
}

# What `FORGERIES` are given; all of them are sealed.
DOUBLES = [
    ["assert double(2) == 4000004", "assert double(3) == 6000006"],
    ["def check(candidate):\n    assert candidate(2) == 4000004\n    assert candidate(3) == 6000006\ncheck(double)"],
    ["assert abs(double(2) - 4000004.0) < 1e-3", "assert not double(3) != 6000006", "assert double(2) is 4000004"],
]
