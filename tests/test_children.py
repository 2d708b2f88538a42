"""Processes that end with those that started them."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.processes import alive, until

CHILD = "from estune.children import watch_parent; watch_parent(); print('ready', flush=True)\nwhile True: pass"
PARENT = f"""
import subprocess, sys, threading
found = []
def start():
    found.append(subprocess.Popen([sys.executable, "-P", "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True))
thread = threading.Thread(target=start)
thread.start()
thread.join()
print(found[0].stdout.readline().strip(), found[0].pid, flush=True)
sys.stdin.read()
"""


def test_a_child_that_computes_ends_with_its_parent_and_not_with_the_thread_that_started_it() -> None:
    command = [sys.executable, "-P", "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ready, pid = parent.stdout.readline().split()
        assert ready == "ready"
        time.sleep(0.7)  # more than it takes to look
        assert alive(int(pid))
        parent.kill()
    until(lambda: not alive(int(pid)), 20)


def test_what_a_new_session_spawns_belongs_to_it() -> None:
    program = (
        "import multiprocessing, os\n"
        "pool = multiprocessing.get_context('spawn').Pool(1)\n"
        "print(pool.apply(os.getpgid, (0,)) == os.getpid())\n"
        "pool.terminate()\n"
    )
    command = [sys.executable, "-u", "-c", program]
    assert (
        subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=True).stdout == "True\n"
    )
