"""The halves of a float32 base: all bits are those of `master`, whatever is done, with ties and odd numbers in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from estune.errors import EstuneError
from estune.es.strategy import Member, Update
from estune.noise import cpu_split
from estune.weights import split as halves
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter, Rectangle
from estune.weights.split import SplitBase
from estune.weights.weights import Weights

SHAPES = {"a.weight": (33, 17), "a.bias": (33,), "b.weight": (70, 64)}
BOTH = ("master", "split_master")
ODD = [0.0, -0.0, 1e-45, -1e-39, 3.3e38, -3.3e38, 1.00390625, 1.01171875, -1.00390625, -1.01171875]  # ties among them


def tensors() -> dict[str, torch.Tensor]:
    """A checkpoint's, in float32: numbers that float16 has, every 16th of which is a tie, and any others."""
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.randn(shape, generator=generator).mul(0.1) for name, shape in SHAPES.items()}
    found["b.weight"] = found["b.weight"].half().float()
    found["a.weight"].view(-1)[: len(ODD)] = torch.tensor(ODD)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("split")
    save_file(tensors(), folder / "model.safetensors")
    return Checkpoint(folder)


def opened(checkpoint: Checkpoint, policy: Any, *, length: int = 1000, **options: Any) -> Weights:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("estune.weights.storage.RUN_LENGTH", length)
        weights = Weights([Parameter(n, t.bfloat16()) for n, t in tensors().items()], policy=policy, **options)
    weights.load(checkpoint)
    return weights


def same(one: Weights, other: Weights) -> bool:
    pairs = zip(one.parameters, other.parameters, strict=True)
    return all(torch.equal(a.tensor.view(torch.int16), b.tensor.view(torch.int16)) for a, b in pairs)


members = st.builds(Member, st.integers(0, 2**64 - 1), st.sampled_from([1, -1]))
steps = st.sampled_from(["restore", "apply", "anchor", "load", "read"])


@given(
    st.lists(st.one_of(members, steps), min_size=1, max_size=12),
    st.sampled_from(["iid", "correlated"]),
    st.sampled_from([1, 3]),
    st.sampled_from([300, 1000, 1 << 20]),
    st.sampled_from([1e-5, 0.01, 3.0]),
)
@settings(max_examples=40)
def test_any_history_has_the_bits_of_master(
    checkpoint: Checkpoint, history: Any, noise: Any, threads: int, length: int, sigma: float
) -> None:
    both = [opened(checkpoint, policy, length=length, noise=noise, threads=threads) for policy in BOTH]
    for step, operation in enumerate(history):
        update = Update(step, (Member(step), Member(9)), (1e-4, -2e-3), decay=-0.01, anchor=0.5, anchor_l1=1e-3)
        for weights in both:
            if isinstance(operation, Member):
                weights.perturb(operation, sigma)
            elif operation == "restore":
                weights.restore()
            elif operation == "apply":
                weights.apply(update)
            elif operation == "anchor":
                weights.anchor(checkpoint, update)
            elif operation == "load":
                weights.load(checkpoint)
        if operation == "read":
            one, other = (weights.base for weights in both)
            assert all(np.array_equal(one[name].view(np.uint32), other[name].view(np.uint32)) for name in one)
        elif isinstance(operation, Member) or operation == "restore":
            assert same(*both)
    assert both[0].fingerprint() == both[1].fingerprint()
    for weights in both:
        weights.restore()
    assert same(*both)
    assert both[1].drift() is None


def test_a_thousand_members_leave_every_bit(checkpoint: Checkpoint) -> None:
    weights = opened(checkpoint, "split_master")
    before = {name: array.view(np.uint32).copy() for name, array in weights.base.items()}
    assert np.array_equal(before["a.weight"], tensors()["a.weight"].view(-1).numpy().view(np.uint32))
    fingerprint = weights.fingerprint()
    addresses = [p.tensor.data_ptr() for p in weights.parameters]
    for seed in range(1000):
        weights.perturb(Member(seed, 1 if seed % 3 else -1), 0.5)
        if seed % 2:
            weights.restore()
    weights.restore()
    assert all(np.array_equal(array.view(np.uint32), before[name]) for name, array in weights.base.items())
    assert weights.fingerprint() == fingerprint
    assert [p.tensor.data_ptr() for p in weights.parameters] == addresses


def test_what_is_saved_and_how_far_it_is_are_those_of_master(checkpoint: Checkpoint, tmp_path: Path) -> None:
    update = Update(0, (Member(3), Member(4, -1)), (0.25, -0.5))
    both = [opened(checkpoint, policy) for policy in BOTH]
    for name, weights in zip(BOTH, both, strict=True):
        weights.perturb(Member(1), 0.01)
        weights.apply(update)
        weights.perturb(Member(2), 0.01)  # while which the base is read
        found = {name: np.concatenate(list(read())) for name, read in weights.runs().items()}
        save_file({n: torch.from_numpy(a) for n, a in found.items()}, tmp_path / f"{name}.safetensors")
    one, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in BOTH)
    assert one == other
    assert both[0].change(checkpoint) == both[1].change(checkpoint)
    assert both[0].change(checkpoint)[0] > 0


def test_a_base_that_was_kept_is_brought_back(checkpoint: Checkpoint) -> None:
    both = [opened(checkpoint, policy) for policy in BOTH]
    for weights in both:
        weights.perturb(Member(1), 0.01)
        weights.keep("before", 1)
        before = weights.fingerprint()
        weights.apply(Update(0, (Member(3),), (0.25,)))
        weights.perturb(Member(2), 0.01)
        assert weights.bring("before")
        assert weights.fingerprint() == before
        weights.restore()
    assert both[0].fingerprint() == both[1].fingerprint()
    assert same(*both)


def test_pieces_of_a_tensor_have_the_bits_of_the_whole(checkpoint: Checkpoint) -> None:
    whole = opened(checkpoint, "split_master")
    source = tensors()["b.weight"].bfloat16()
    left, right = (source[:, at : at + 32].contiguous() for at in (0, 32))
    pieces = Weights(
        [Parameter("b.weight", t, (), Rectangle(0, at, 70, 32, 64)) for at, t in ((0, left), (32, right))],
        policy="split_master",
        threads=2,
    )
    pieces.load(checkpoint)
    for weights in (whole, pieces):
        weights.perturb(Member(1), 0.01)
        weights.apply(Update(0, (Member(3), Member(4, -1)), (0.25, -0.5)))
        weights.perturb(Member(2), 0.01)
    expected = dict(zip(SHAPES, whole.parameters, strict=True))["b.weight"].tensor
    assert torch.equal(torch.cat((left, right), 1), expected)
    found = np.concatenate(list(pieces.runs()["b.weight"]()))
    assert np.array_equal(found, whole.base["b.weight"])
    rows = pieces.rows("b.weight", 5, 3)
    assert [row for row, _, _ in rows] == [5, 5]
    assert np.array_equal(np.concatenate([values for _, _, values in rows], 1).reshape(-1), found[320:512])


def test_other_types_are_refused_with_what_to_take() -> None:
    for dtype, instead in (
        (torch.float32, "or weights=exact_inplace, which in float32"),
        (torch.float16, "or weights=master"),
    ):
        with pytest.raises(EstuneError, match=f"in bfloat16, not in float.*: set dtype=bfloat16, {instead}"):
            Weights([Parameter("a", torch.zeros(3, dtype=dtype))], policy="split_master")


def test_ties_are_noted_where_they_are_and_nowhere_else() -> None:
    base = SplitBase.of(torch.zeros(100, dtype=torch.bfloat16), 32)
    tie, plain = torch.tensor([1.01171875]), torch.tensor([1.0])
    for place in (0, 31, 32, 99):
        base[place : place + 1].copy_(tie)
    assert {block: places.tolist() for block, places in base.ties.items()} == {0: [0, 31], 1: [0], 3: [3]}
    base[31:33].copy_(torch.cat((plain, tie)))
    base[90:].copy_(plain.expand(10).contiguous())
    assert {block: places.tolist() for block, places in base.ties.items()} == {0: [0], 1: [0]}
    assert base.read()[[0, 31, 32, 99]].tolist() == [1.01171875, 1.0, 1.01171875, 1.0]


@given(
    st.lists(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0x3F818000, 0x3F808000])), min_size=1, max_size=40)
)
@settings(max_examples=100)
def test_torch_has_the_bits_of_the_kernels(bits: list[int]) -> None:
    """On a device torch makes and joins halves; here on the CPU's tensors."""
    values = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    upper, lower = (torch.empty(len(bits), dtype=torch.int16) for _ in range(2))
    tied = halves.split_by_torch(values, upper, lower)
    expected = [np.empty(len(bits), np.uint16) for _ in range(2)]
    assert tied.tolist() == cpu_split.split(values.numpy(), *expected).tolist()
    assert np.array_equal(halves.as_array(upper), expected[0])
    assert np.array_equal(halves.as_array(lower), expected[1])
    upper[tied] -= 1
    assert torch.equal(halves.join_by_torch(upper, lower).view(torch.int32), values.view(torch.int32))
