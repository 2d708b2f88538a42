"""Compile the Triton kernels for CUDA devices that need not be there, and see that each operation is rounded."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from estune.noise import gpu

CAPABILITIES = (80, 90)
_PAIRS = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"))
_ROUNDINGS = (("fp32", False), ("bf16", False), ("bf16", True), ("fp16", False))
# Kernel, types of its pointers, flags: each as `perturb`, `update` and `fingerprint` call it.
KERNELS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    *(
        ("_perturb", {"live": f"*{live}", "base": f"*{base}"}, {"PITCHED": pitched, "COUNT": gpu.BLOCK})
        for pitched in (False, True)
        for live, base in _PAIRS
    ),
    *(
        (
            "_update",
            {"base": f"*{base}", "seeds": "*i64", "coefficients": "*fp32"},
            {"STOCHASTIC": stochastic, "PITCHED": pitched, "COUNT": gpu.BLOCK},
        )
        for pitched in (False, True)
        for base, stochastic in _ROUNDINGS
    ),
    *(
        (
            "_fingerprint",
            {"weights": f"*i{bits}", "total": "*i64"},
            {"BITS": bits, "PITCHED": pitched, "COUNT": gpu.FINGERPRINT_BLOCK},
        )
        for pitched in (False, True)
        for bits in (32, 16)
    ),
]
FORBIDDEN = re.compile(r"\bfma\.|\bmad\.\w+\.f32|\.ftz\b|\.approx\b")


def main() -> None:
    """Print the name of each kernel, once for each way it is compiled, if all are as they should be."""
    for capability in CAPABILITIES:
        for name, types, flags in KERNELS:
            kernel = getattr(gpu, name)
            signature = {p.name: p.annotation_type or types.get(p.name, "constexpr") for p in kernel.params}
            source = ASTSource(kernel, signature, flags)
            options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
            text = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
            found = FORBIDDEN.findall(text)
            assert not found, f"{name} {types} {flags} for sm_{capability}: {found}"
            print(name)


if __name__ == "__main__":
    main()
