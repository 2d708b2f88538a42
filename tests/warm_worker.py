"""What a raylet starts in place of Python: has its warm process fork the worker, another child of the raylet, and ends.

Ray knows a worker by the id among its arguments, and learns its process id from itself.
"""

import json
import os
import socket
import sys

_, setup, *command = sys.argv
if "--serialized-runtime-env-context" in " ".join(command):
    os.execv(sys.executable, [sys.executable, setup, *command])
request = {
    "arguments": ["", *(each for each in command if not each.startswith("--language="))],
    "environment": dict(os.environ),
    "folder": os.getcwd(),
    "session": False,
    "group": True,
    "safe_path": False,
    "descriptors": [0, 1, 2],
}
warm = socket.socket(fileno=int(os.environ["ESTUNE_TESTS_WARM"]))
socket.send_fds(warm, [json.dumps(request).encode()], [0, 1, 2])
warm.recv(32)
