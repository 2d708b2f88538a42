"""Compile the Triton kernels for CUDA devices that need not be there, and see that each operation is rounded."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from estune.noise import gpu, gpu_inplace, gpu_low_rank

CAPABILITIES = (80, 90)
_FLOAT, _BRAIN, _HALF = tl.float32, tl.bfloat16, tl.float16
# Whether runs are columns of their tensors, and whether they are of whole counters: see `gpu.Batch`.
_PLAIN, *_OTHERS = [
    {"PITCHED": pitched, "ALIGNED": aligned, "COUNT": gpu.BLOCK, "STEPS": gpu.STEPS}
    for pitched, aligned in ((False, True), (True, True), (False, False))
]
_TABLE = {"table": "*i64", "owners": "*i32"}
_MEMBERS = {"seeds": "*i64", "coefficients": "*fp32"}


def _each_kind(name: str, pointers: dict[str, str], *types: dict[str, Any]) -> list[Any]:
    """A kernel of plain runs of all types, and of the other kinds of runs of the first."""
    return [(name, _TABLE | pointers, t | _PLAIN) for t in types] + [
        (name, _TABLE | pointers, types[0] | kind) for kind in _OTHERS
    ]


# Kernel, types of its pointers, flags: as the passes call it.
KERNELS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *_each_kind(
        "_perturb",
        {},
        *(
            {"LIVE_TYPE": live, "BASE_TYPE": base}
            for live, base in ((_BRAIN, _FLOAT), (_FLOAT, _FLOAT), (_HALF, _FLOAT), (_BRAIN, _BRAIN), (_HALF, _HALF))
        ),
    ),
    *_each_kind("_restore", {}, {"LIVE_TYPE": _BRAIN, "BASE_TYPE": _FLOAT}),
    *_each_kind(
        "_update",
        _MEMBERS,
        *(
            {"STOCHASTIC": stochastic, "BASE_TYPE": base}
            for base, stochastic in ((_BRAIN, True), (_FLOAT, False), (_BRAIN, False), (_HALF, False))
        ),
    ),
    *_each_kind("_fingerprint", {"total": "*i64"}, {"BITS_TYPE": tl.uint32}, {"BITS_TYPE": tl.uint16}),
    *(
        (
            "_squares",
            {"now": f"*{now}", "then": "*bf16", "sums": "*fp64"},
            {"BLOCK": gpu.SQUARES_BLOCK, "LANES": gpu.SQUARES_LANES},
        )
        for now in ("fp32", "bf16")
    ),
]
_WORDS = {"words": "*u16", "used": "*i64", "starts": "*i64", "counts": "*i32"}
_IN_PLACE: list[dict[str, Any]] = [
    {"TYPE": _BRAIN, "BITS": tl.uint16, "SPLIT": False},
    {"TYPE": _FLOAT, "BITS": tl.uint32, "SPLIT": False},
    {"TYPE": _BRAIN, "BITS": tl.uint16, "SPLIT": True},
]
KERNELS_IN_PLACE = [
    *_each_kind("_perturb", _WORDS, *_IN_PLACE),
    *_each_kind("_subtract", _WORDS, *({"TYPE": _BRAIN, "SPLIT": split} for split in (False, True))),
    *_each_kind("_patch", _WORDS, {"BITS": tl.uint16}),
]
_DRAWN = {"takes": "*i64", "drawn": "*fp32"}
KERNELS_LOW_RANK = [
    ("_draw", {"vectors": "*i64", "owners": "*i32", "seeds": "*i64", "out": "*fp32"}, {"COUNT": gpu_low_rank.DRAWN}),
    *_each_kind("_perturb", _DRAWN, {"LIVE_TYPE": _BRAIN, "BASE_TYPE": _FLOAT, "RANK": 2, "SHARE": 0.7071067690849304}),
    *_each_kind(
        "_update",
        _DRAWN | {"coefficients": "*fp32"},
        {"STOCHASTIC": True, "BASE_TYPE": _BRAIN, "RANK": 1, "SHARE": 1.0},
        {"STOCHASTIC": False, "BASE_TYPE": _FLOAT, "RANK": 2, "SHARE": 0.7071067690849304},
    ),
]
FORBIDDEN = re.compile(r"\bfma\.|\bmad\.\w+\.f32|\.ftz\b|\.approx\b")
_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_NORMALS = 4 * gpu.BLOCK // (32 * gpu.WARPS)  # of each thread, each time


def main() -> None:
    """Print the name of each kernel, once for each way it is compiled, if all are as they should be.

    Beside it the machine's instructions for a normal, of the kernels that make normals of whole counters on Hopper.
    """
    for capability in CAPABILITIES:
        kernels = [(gpu, *k) for k in KERNELS]
        if capability == CAPABILITIES[-1]:
            kernels += [(gpu_inplace, *k) for k in KERNELS_IN_PLACE]
            kernels += [(gpu_low_rank, *k) for k in KERNELS_LOW_RANK]
        else:  # the newest device's are compiled in all types
            kernels = [
                (gpu, *next(k for k in KERNELS if k[0] == name)) for name in dict.fromkeys(k[0] for k in KERNELS)
            ]
        for module, name, types, flags in kernels:
            kernel = next(k for k in vars(module).values() if getattr(k, "__name__", "") == name)
            signature = {p.name: p.annotation_type or types.get(p.name, "constexpr") for p in kernel.params}
            source = ASTSource(kernel, signature, flags)
            options = {"num_warps": 4 if name == "_squares" else gpu.WARPS, "enable_fp_fusion": False}
            code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
            found = FORBIDDEN.findall(code["ptx"])
            assert not found, f"{name} {types} {flags} for sm_{capability}: {found}"
            whole = flags.get("ALIGNED") and not flags["PITCHED"]
            counted = capability == 90 and module is gpu and name in {"_perturb", "_update"} and whole
            print(name, round(innermost(code["cubin"]) / _NORMALS, 1) if counted else "-")


def innermost(cubin: bytes) -> int:
    """Instructions of the longest loop that has no loop within: rare branches, as a root's far ones, are in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                loops.append((labels[back[1]], count))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return max(b - a for a, b in inner)


if __name__ == "__main__":
    main()
