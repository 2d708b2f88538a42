"""What is kept of compiled kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import estune

ROUND = """
import numpy as np
from estune.noise import cpu
found = np.empty(1, np.uint16)
cpu.copy(found, np.full(1, 1.5, np.float32))
print(hex(found[0]))
"""


def test_a_kernel_is_compiled_again_when_what_it_calls_in_another_file_has_changed(tmp_path: Path) -> None:
    shutil.copytree(Path(estune.__file__).parent, tmp_path / "estune", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def rounded() -> str:
        command = [sys.executable, "-c", ROUND]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    assert rounded() == "0x3fc0"
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*._copy*.nbc")}
    assert kept
    assert rounded() == "0x3fc0"
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*._copy*.nbc")}  # once
    types = tmp_path / "estune" / "noise" / "cpu_types.py"
    types.write_text(types.read_text().replace("np.uint32(0x7FFF) + parity", "np.uint32(0x1FFFF) + parity"))
    assert rounded() == "0x3fc1"
