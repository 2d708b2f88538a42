"""Weights in rectangles of their tensors, as an engine's processes hold them, against the whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from estune.es.strategy import Member, Update
from estune.es.update import as_fingerprint
from estune.noise import cpu, reference
from estune.noise.rows import Rows, Run
from estune.weights.base import Share, share_of
from estune.weights.checkpoint import Checkpoint
from estune.weights.parameters import Parameter, Rectangle
from estune.weights.storage import CpuStorage, as_array
from estune.weights.weights import Weights
from tests.weights.test_weights_gpu import DTYPES, KINDS, kind_of_storage, on_device

MEMBER, SIGMA = Member(2**63 + 11, -1), 0.02
UPDATE = Update(0, (Member(3), Member(4)), (0.25, -0.5), decay=-0.125, rounding_seed=2**64 - 9)


def cuts(size: int, step: int) -> st.SearchStrategy[list[int]]:
    """Places to cut a length, all multiples of `step`, the ends included."""
    inner = st.sets(st.integers(1, max(1, size // step - 1)).map(lambda n: n * step), max_size=3)
    return inner.map(lambda places: sorted({0, size, *(p for p in places if p < size)}))


@st.composite
def tilings(draw: Any) -> tuple[tuple[int, int], list[Rectangle]]:
    """A tensor's shape and rectangles that cover it: bands of rows, each cut into columns."""
    step = draw(st.sampled_from([1, 4]))  # by 4 is what kernels take at once
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 6)) * (4 if step == 4 else draw(st.integers(1, 3)))
    bands, found = draw(cuts(rows, 1)), []
    for top, bottom in pairwise(bands):
        places = draw(cuts(columns, step))
        for left, right in pairwise(places):
            found.append(Rectangle(top, left, bottom - top, right - left, columns))
    return (rows, columns), found


def whole_tensor(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(0.1).to(dtype)


def cut(tensor: torch.Tensor, part: Rectangle) -> torch.Tensor:
    return tensor[part.row : part.row + part.rows, part.column : part.column + part.width].contiguous()


def pieces(tensor: torch.Tensor, parts: list[Rectangle]) -> list[Parameter]:
    return [Parameter("w", cut(tensor, part).view(-1), (), part) for part in parts]


def put_together(weights: Weights, shape: tuple[int, int]) -> Any:
    first = as_array(weights.parameters[0].tensor.cpu())
    found = np.zeros(shape, first.dtype)
    for p in weights.parameters:
        part, array = p.part, as_array(p.tensor.cpu())
        rows, columns = slice(part.row, part.row + part.rows), slice(part.column, part.column + part.width)
        found[rows, columns] = array.reshape(part.rows, part.width)
    return found


@given(
    tilings(),
    st.sampled_from(DTYPES),
    st.sampled_from(["master", "copy", "inplace"]),
    st.sampled_from(["nearest", "stochastic"]),
    st.sampled_from([3, 8, 1000]),
)
@settings(max_examples=60)
def test_pieces_have_the_bits_of_the_whole(tiling: Any, dtype: Any, policy: Any, rounding: Any, length: int) -> None:
    shape, parts = tiling
    tensor = whole_tensor(shape, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("estune.weights.storage.RUN_LENGTH", length)
        split = Weights(pieces(tensor, parts), policy=policy, rounding=rounding)
        whole = Weights([Parameter("w", tensor)], policy=policy, rounding=rounding)
        for weights in (split, whole):
            weights.perturb(MEMBER, SIGMA)
        assert np.array_equal(put_together(split, shape), as_array(tensor).reshape(shape))
        for weights in (split, whole):
            weights.apply(UPDATE)
            weights.restore()
        assert np.array_equal(put_together(split, shape), as_array(tensor).reshape(shape))
        assert split.fingerprint() == whole.fingerprint()
        assert split.elements == whole.elements
    for first in range(0, shape[0], 2):
        found = {(row, column): array for row, column, array in split.rows("w", first, 2)}
        base = whole.base["w"].reshape(shape)
        assert sum(array.size for array in found.values()) == base[first : first + 2].size
        for (row, column), array in found.items():
            assert np.array_equal(array, base[row : row + len(array), column : column + array.shape[1]])


@pytest.mark.parametrize("kind", KINDS)
@given(tilings(), st.sampled_from(DTYPES), st.sampled_from(["nearest", "stochastic"]), st.sampled_from([14, 40, 1000]))
@settings(max_examples=5)
def test_pieces_on_a_device_have_the_bits_of_the_cpu(
    kind: str, tiling: Any, dtype: Any, rounding: Any, length: int
) -> None:
    shape, parts = tiling
    tensor = whole_tensor(shape, dtype)
    split = Weights(pieces(tensor, parts), policy="copy", rounding=rounding)
    with kind_of_storage(kind, length):
        device = on_device(pieces(tensor, parts), kind, policy="copy", rounding=rounding)
        for weights in (split, device):
            weights.perturb(MEMBER, SIGMA)
        assert np.array_equal(put_together(device, shape), put_together(split, shape))
        for weights in (split, device):
            weights.apply(UPDATE)
            weights.restore()
        assert np.array_equal(put_together(device, shape), put_together(split, shape))
        assert device.fingerprint() == split.fingerprint()


def test_a_piece_counted_elsewhere_is_perturbed_but_not_in_the_fingerprint() -> None:
    tensor, part = whole_tensor((6, 8), torch.float32), Rectangle(2, 0, 4, 8, 8)
    whole = Weights([Parameter("w", tensor.clone())])
    replica = Parameter("w", cut(tensor, part).view(-1), (), part, counted=False)
    both = Weights([Parameter("w", tensor), replica])
    assert both.fingerprint() == whole.fingerprint()
    assert both.elements == 48
    both.apply(UPDATE)
    both.perturb(MEMBER, SIGMA)
    assert torch.equal(replica.tensor.view(4, 8), tensor[2:])
    whole.apply(UPDATE)
    assert both.fingerprint() == whole.fingerprint()
    assert [array.shape for _, _, array in both.rows("w", 0, 6)] == [(6, 8)]


def test_fingerprints_of_processes_add_up() -> None:
    tensor = whole_tensor((7, 10), torch.bfloat16)
    halves = [Rectangle(0, 0, 7, 4, 10), Rectangle(0, 4, 7, 6, 10)]
    shards = [Weights(pieces(tensor, [half])) for half in halves]
    assert as_fingerprint(sum(s.share_sum() for s in shards)) == Weights([Parameter("w", tensor)]).fingerprint()


def test_a_base_is_loaded_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("estune.weights.weights.RUN_LENGTH", 40)
    stored = whole_tensor((9, 15), torch.float32)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    parts = [Rectangle(0, 0, 9, 7, 15), Rectangle(0, 7, 4, 8, 15), Rectangle(4, 7, 5, 8, 15)]
    split = Weights(pieces(torch.zeros(9, 15), parts))
    split.load(Checkpoint(tmp_path))
    split.restore()
    assert np.array_equal(put_together(split, (9, 15)), stored.numpy())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_of_pieces_cover_them(count: int) -> None:
    """Cut in the middle of rows."""
    tensor, part = whole_tensor((9, 15), torch.float32), Rectangle(1, 3, 7, 5, 15)
    expected = Weights(pieces(tensor, [part]))
    expected.apply(UPDATE)
    base = cut(tensor, part).view(-1)
    run = Run(base, base, reference.tensor_id("w"), reference.tensor_id("w"), part.start, part.layout)
    for index in range(count):
        CpuStorage(share_of([run], Share(-1, index, count)), 1).update(UPDATE, "nearest")
    assert np.array_equal(base.numpy(), expected.base["w"])


def places(start: int, size: int, rows: Rows) -> Iterator[int]:
    for i in range(rows.skip, rows.skip + size):
        yield start + i // rows.width * rows.pitch + i % rows.width


@pytest.mark.parametrize("rows", [Rows(5, 15, 0), Rows(5, 15, 7), Rows(4, 12, 8), Rows(1, 3, 2)])
def test_each_element_has_the_noise_of_its_place(rows: Rows) -> None:
    key, start, size = reference.tensor_id("w"), 2**34 + 8, 23
    live, base = np.zeros(size, np.float32), np.zeros(size, np.float32)
    cpu.perturb(live, base, 9, key, start, 1.0, rows)
    expected = [reference.normal_by_id(9, key, place, 1)[0] for place in places(start, size, rows)]
    assert np.array_equal(live, np.array(expected, np.float32))
    run = Run(live, base, key, key, start, rows)
    assert [s.start + i for s in run.stretches() for i in range(len(s.live))] == list(places(start, size, rows))
    halves = [*run.part(0, 9).stretches(), *run.part(9, size).stretches()]
    assert [s.start + i for s in halves for i in range(len(s.live))] == list(places(start, size, rows))
