"""The table of GPUs."""

from __future__ import annotations

import pytest

from estune.errors import EstuneError
from estune.study.estimate.machines import GPUS, as_device, find_gpu, recognise


def test_gpus_are_found_by_name() -> None:
    assert find_gpu("RTX-4090").name == "NVIDIA GeForce RTX 4090"
    assert find_gpu("a100_80").gigabytes == 80
    for gpu in GPUS:
        assert find_gpu(gpu.key) is gpu
        assert gpu.source
    for name, gigabytes, key in [
        ("NVIDIA H100 80GB HBM3", 85.5, "h100"),
        ("NVIDIA H100 PCIe", 85.5, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 42.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100-80"),
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA L4", 23.6, "l4"),
        ("NVIDIA RTX A6000", 50.9, "a6000"),
        ("NVIDIA GeForce RTX 4090", 25.4, "rtx4090"),
        ("NVIDIA A10", 23.7, "a10"),
        ("Tesla T4", 15.8, "t4"),
    ]:
        assert recognise(name, int(gigabytes * 1e9)).key == key
    for name in ("Quadro K2000", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA T400 4GB", "NVIDIA GH200 480GB"):
        with pytest.raises(EstuneError, match=rf"{name}, is not in the table.*--gpu"):
            recognise(name, 8 * 10**9)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a100", "did you mean a100-80 or a100-40?"),  # and not a10
        ("NVIDIA H100 80GB HBM3", "did you mean h100 or h100-pcie?"),
        ("4090", "did you mean rtx4090?"),
        ("mi300x", "not in the table; known are"),
        ("", "not in the table; known are"),
    ],
)
def test_names_that_come_near_are_said(name: str, said: str) -> None:
    with pytest.raises(EstuneError) as error:
        find_gpu(name)
    assert said in str(error.value)


def test_a_gpu_without_bfloat16_computes_at_the_rate_of_float32() -> None:
    t4 = find_gpu("t4")
    assert as_device(t4, "bfloat16").decode == as_device(t4, "float32").decode
    assert as_device(t4, "float16").decode > 5 * as_device(t4, "bfloat16").decode
