"""The map of an engine's tensors, drawn by loaders that fuse, pad, shard and replicate as engines do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estune.engines.vllm.parameter_map import by_rows, count_once, draw_map, tied_names
from estune.errors import EstuneError
from estune.weights.parameters import Rectangle

SHAPES = {"embed": (300, 6), "q": (8, 6), "k": (4, 6), "q.bias": (8,), "k.bias": (4,), "out": (6, 520), "scale": (1,)}
ORIGINAL = -7.5


class Toy:
    """One of several processes that share a model, in vLLM's manner: q and k fused, rows padded, `out` by columns."""

    def __init__(self, rank: int, count: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> None:
        self.rank, self.count, self.heads = rank, count, heads
        kept = min(count, heads)
        rows = -(-300 // (64 * count)) * 64
        shapes = {
            "embed": (rows, 6),
            "qk": (8 // count + 4 // kept, 6),
            "qk.bias": (8 // count + 4 // kept,),
            "out": (6, 520 // count),
            "scale": (1,),
        }
        self.tensors = {name: torch.full(shape, ORIGINAL, dtype=dtype) for name, shape in shapes.items()}

    def load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Rows beyond the vocabulary become 0, as vLLM has it."""
        for name, tensor in tensors:
            share = tensor.shape[-1 if name == "out" else 0] // self.count
            if name == "embed":
                rows = len(self.tensors["embed"])
                held = tensor[self.rank * rows : (self.rank + 1) * rows]
                self.tensors["embed"][: len(held)] = held
                self.tensors["embed"][len(held) :] = 0
            elif name == "out":
                self.tensors["out"].copy_(tensor[:, self.rank * share : (self.rank + 1) * share])
            elif name == "scale":
                self.tensors["scale"].copy_(tensor)
            elif name in ("q", "k", "q.bias", "k.bias"):
                live = self.tensors["qk.bias" if "bias" in name else "qk"]
                if name.startswith("q"):
                    live[:share] = tensor[self.rank * share : (self.rank + 1) * share]
                else:
                    kept = min(self.count, self.heads)
                    size, place = 4 // kept, self.rank * kept // self.count
                    live[8 // self.count :] = tensor[place * size : (place + 1) * size]


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@given(
    st.sampled_from([(1, 2), (2, 2), (2, 1), (4, 2)]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
@settings(max_examples=12)
def test_loading_by_the_map_is_loading_by_the_loader(processes: tuple[int, int], dtype: torch.dtype) -> None:
    count, heads = processes
    stored, maps = checkpoint(), []
    for rank in range(count):
        toy, loaded = Toy(rank, count, heads, dtype), Toy(rank, count, heads, dtype)
        loaded.load(iter(stored.items()))
        maps.append(draw_map(toy.tensors, SHAPES, toy.load))
        for place in maps[-1]:
            part = place.part
            held = by_rows(stored[place.name])[part.row : part.row + part.rows, part.column : part.column + part.width]
            by_rows(toy.tensors[place.tensor])[place.row : place.row + part.rows] = held
        assert all(torch.equal(toy.tensors[name], loaded.tensors[name]) for name in loaded.tensors)
    elements = dict.fromkeys(SHAPES, 0)
    for places, counted in zip(maps, count_once(maps, SHAPES), strict=True):
        for place, counts in zip(places, counted, strict=True):
            elements[place.name] += place.part.elements if counts else 0
    assert elements == {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}


def test_a_map_has_few_rectangles() -> None:
    toy = Toy(1, 2)
    assert {(p.tensor, p.row, p.name): p.part for p in draw_map(toy.tensors, SHAPES, toy.load)} == {
        ("embed", 0, "embed"): Rectangle(192, 0, 108, 6, 6),
        ("qk", 0, "q"): Rectangle(4, 0, 4, 6, 6),
        ("qk", 4, "k"): Rectangle(2, 0, 2, 6, 6),
        ("qk.bias", 0, "q.bias"): Rectangle(4, 0, 4, 1, 1),
        ("qk.bias", 4, "k.bias"): Rectangle(2, 0, 2, 1, 1),
        ("out", 0, "out"): Rectangle(0, 260, 6, 260, 520),
        ("scale", 0, "scale"): Rectangle(0, 0, 1, 1, 1),
    }


def test_what_no_loader_touches_stays_as_it_is() -> None:
    toy = Toy(0, 1)
    toy.tensors["own"] = torch.full((3, 3), ORIGINAL)
    places = draw_map(toy.tensors, SHAPES, toy.load)
    assert "own" not in {place.tensor for place in places}
    assert bool((toy.tensors["own"] == ORIGINAL).all())


def _changed(toy: Toy, tensors: Any) -> None:
    toy.load((name, -tensor.exp() if name == "scale" else tensor) for name, tensor in tensors)


def _turned(toy: Toy, tensors: Any) -> None:
    for name, tensor in tensors:
        if name == "embed":
            toy.tensors["turned"].copy_(tensor.t())
        else:
            toy.load(iter([(name, tensor)]))


def test_other_layouts_are_refused() -> None:
    toy = Toy(0, 1)
    with pytest.raises(EstuneError, match="the engine changes scale while loading it"):
        draw_map(toy.tensors, SHAPES, lambda tensors: _changed(toy, tensors))
    turned = Toy(0, 1)
    turned.tensors = {"turned": torch.zeros(6, 300), **{k: v for k, v in turned.tensors.items() if k != "embed"}}
    with pytest.raises(EstuneError, match="turned is not made of rows of embed"):
        draw_map(turned.tensors, SHAPES, lambda tensors: _turned(turned, tensors))
    with pytest.raises(EstuneError, match="does not take plain tensors for this model"):
        draw_map(toy.tensors, {**SHAPES, "q": (7, 5)}, toy.load)


def test_a_tensor_held_in_part_or_twice_is_refused() -> None:
    maps = [draw_map(toy.tensors, SHAPES, toy.load) for toy in (Toy(0, 2), Toy(1, 2))]
    count_once(maps, SHAPES)
    with pytest.raises(EstuneError, match="of 1800 elements of embed the engine holds 1152, in 1 parts"):
        count_once(maps[:1], SHAPES)
    whole = Toy(0, 1)
    with pytest.raises(EstuneError, match="in 2 parts"):
        count_once([draw_map(whole.tensors, SHAPES, whole.load), maps[0]], SHAPES)


def test_tied_names_are_found_by_shape() -> None:
    class Config:
        vocab_size, hidden_size, tie_word_embeddings = 300, 6, True

    shapes = {**SHAPES, "head": (300, 6), "unused": (2,)}
    toy = Toy(0, 1)
    places = draw_map(toy.tensors, shapes, toy.load)
    assert tied_names(places, shapes, Config) == {"embed": ["head"]}
    Config.tie_word_embeddings = False
    assert tied_names(places, shapes, Config) == {}
