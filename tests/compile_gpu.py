"""Compile the Triton kernels for a CUDA device that need not be there, and see that each operation is rounded."""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from estune.noise import gpu

KERNELS: dict[str, dict[str, Any]] = {
    "_perturb": {"live": "*bf16", "base": "*fp32", "COUNT": gpu.BLOCK},
    "_update": {"base": "*fp16", "seeds": "*i64", "coefficients": "*fp32", "STOCHASTIC": False, "COUNT": gpu.BLOCK},
    "_fingerprint": {"weights": "*i16", "total": "*i64", "BITS": 16, "COUNT": gpu.FINGERPRINT_BLOCK},
}
FORBIDDEN = re.compile(r"\bfma\.|\bmad\.\w+\.f32|\.ftz\b|\.approx\b")


def main() -> None:
    """Print the name of each kernel that is as it should be."""
    for name, given in KERNELS.items():
        kernel = getattr(gpu, name)
        signature = {p.name: p.annotation_type or given.get(p.name) for p in kernel.params}
        constants = {key: value for key, value in given.items() if not isinstance(value, str)}
        source = ASTSource(
            kernel, {k: v if isinstance(v, str) else "constexpr" for k, v in signature.items()}, constants
        )
        options = {"num_warps": gpu.WARPS, "enable_fp_fusion": False}
        text = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        assert not FORBIDDEN.findall(text), FORBIDDEN.findall(text)
        print(name)


if __name__ == "__main__":
    main()
