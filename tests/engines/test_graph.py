"""Static decoding steps against transformers' `generate`, token for token: run, taped on the CPU, captured on a GPU."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from estune.completion import Sampling
from estune.engines.graph import (
    WARM_UPS,
    CudaRecorder,
    GraphDecoder,
    Recorder,
    first_rows,
    power_of_two,
    round_up,
    uncapturable,
)
from estune.engines.progress import OWN
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.engines.test_decode import (
    EVEN,
    MIXED,
    NEW,
    PLAIN,
    PREFIXED,
    assert_counted,
    cut,
    decode,
    decoder_of,
    model_of,
    reference,
    unchanged,
)
from tests.models import build_model
from tests.tapes import TapeRecorder

WINDOWED = ("mistral", "gemma2", "gemma3")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a CUDA device")


@functools.cache
def with_window(name: str) -> Any:
    """A model whose sliding window, if it has one, reaches over all prompts."""
    return unchanged(build_model(name, **({"sliding_window": 128} if name in WINDOWED else {})))


def static_decoder(model: Any, end_ids: Sequence[int] = (), recorder: Recorder | None = None) -> GraphDecoder:
    """A decoder of a copy on the CPU, with slots rounded finely enough for short tests to pass several."""
    decoder = GraphDecoder(copy.deepcopy(model), end_ids, 0, recorder)
    decoder.least_slots = 8
    return decoder


def shapes_of(decoder: GraphDecoder) -> list[tuple[int, int]]:
    """Rows and visible slots of each step that `decoder` takes from now on; no two rows may write to one place."""
    seen: list[tuple[int, int]] = []
    advance = decoder.advance

    def watched(shape: Any) -> None:
        seen.append(shape[:2])
        places = decoder.buffers.place[: shape.rows].tolist()
        places = [place for place in places if place != decoder.buffers.nowhere]
        assert len(places) == len(set(places))
        advance(shape)

    decoder.advance = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("taped", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_completions_equal_generate(name: str, taped: bool) -> None:
    model = with_window(name)
    assert uncapturable(model) is None
    recorder = TapeRecorder() if taped else None
    decoder = static_decoder(model, recorder=recorder)
    for prompts in (MIXED, PREFIXED, EVEN, MIXED):  # the last in buffers and tapes of the first
        assert decode(decoder, prompts) == [reference(model, prompt) for prompt in prompts]
    assert not recorder or recorder.replayed > NEW


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_rows_of_padding_change_nothing(count: int) -> None:
    model = model_of("qwen2")
    decoder = static_decoder(model, recorder=TapeRecorder())
    seen = shapes_of(decoder)
    assert decode(decoder, MIXED[-count:]) == [reference(model, prompt) for prompt in MIXED[-count:]]
    assert {rows for rows, _ in seen} == {first_rows(count)}


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
@pytest.mark.parametrize("check_every", [1, 4])
@pytest.mark.parametrize("taped", [False, True])
def test_rows_that_end_leave_for_smaller_shapes(name: str, check_every: int, taped: bool) -> None:
    model = model_of(name)
    prompts = MIXED + PREFIXED
    plain = [reference(model, prompt) for prompt in prompts]
    # Tokens of the first rows that the last ones never come to: ends at several places, and rows that do not end.
    end_ids = tuple(
        {token for row in plain[:-3] for token in row[2::6]} - {token for row in plain[-3:] for token in row}
    )
    expected = [reference(model, prompt, end_ids=end_ids) for prompt in prompts]
    assert len({len(row) for row in expected}) > 3
    assert sum(len(row) == NEW for row in expected) in range(3, 5)
    decoder = static_decoder(model, end_ids, TapeRecorder() if taped else None)
    decoder.check_every = check_every
    for _ in range(WARM_UPS + 2):
        seen = shapes_of(decoder)
        before = OWN.now()
        assert cut(decode(decoder, prompts), end_ids) == expected
        assert_counted(OWN.now().since(before), prompts, expected, late=check_every - 1)
        assert seen[0][0] == 16
        assert seen[-1][0] <= 4
        assert len({slots for _, slots in seen}) > 1


def test_decoding_stops_when_all_rows_have_ended() -> None:
    model = model_of("qwen2")
    end_ids = tuple({reference(model, prompt)[2] for prompt in EVEN})
    decoder = static_decoder(model, end_ids)
    seen = shapes_of(decoder)
    assert cut(decode(decoder, EVEN), end_ids) == [reference(model, prompt, end_ids=end_ids) for prompt in EVEN]
    assert len(seen) <= 2
    decoder = static_decoder(model, [reference(model, prompt)[0] for prompt in EVEN])
    seen = shapes_of(decoder)
    decode(decoder, EVEN)
    assert not seen, "rows that end with their first token"


def test_one_capture_serves_every_member() -> None:
    model = build_model("llama")
    recorder = TapeRecorder()
    decoder = static_decoder(model, recorder=recorder)
    found = []
    for member in range(4):
        for changed in (model, decoder.model):
            torch.manual_seed(member)
            for parameter in changed.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        found.append(decode(decoder, MIXED))
        assert found[-1] == [reference(model, prompt) for prompt in MIXED]
    assert len({str(rows) for rows in found}) == 4
    assert recorder.forgotten == 1  # when there was nothing yet
    shapes = 3  # slots: 32, 48, 64
    assert len(recorder.tapes) == shapes
    assert recorder.warmed == shapes * WARM_UPS
    assert recorder.replayed == 4 * (NEW - 1) - recorder.warmed


@pytest.mark.parametrize("grow", ["rows", "slots", "new", "weights"])
def test_captures_are_dropped_when_something_moves(grow: str) -> None:
    model = model_of("qwen2")
    recorder = TapeRecorder()
    decoder = static_decoder(model, recorder=recorder)
    assert decode(decoder, EVEN) == decode(decoder, EVEN)
    assert recorder.forgotten == 1
    prompts, new = EVEN, NEW
    if grow == "rows":
        prompts = EVEN * 3
    elif grow == "slots":
        prompts = [prompt * 4 for prompt in EVEN]
    elif grow == "new":
        new = 3 * NEW
    else:
        for parameter in decoder.model.parameters():
            parameter.data = parameter.data.clone()
    expected = [reference(model, prompt, new) for prompt in prompts]
    assert decode(decoder, prompts, Sampling(new)) == expected
    assert recorder.forgotten == 2
    assert decode(decoder, prompts, Sampling(new)) == expected
    assert decode(decoder, EVEN) == [reference(model, prompt) for prompt in EVEN]
    assert recorder.forgotten == 2


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_nothing_of_earlier_calls_is_read(name: str) -> None:
    model = model_of(name)
    decoder = static_decoder(model, recorder=TapeRecorder())
    first = [decode(decoder, prompts) for prompts in (MIXED, PREFIXED, EVEN)]
    for prompts, expected in zip((MIXED, PREFIXED, EVEN), first, strict=True):
        with torch.inference_mode():
            for tensor in (*decoder.cache.storage.values(), *decoder.buffers.all()):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 1_000_000)
        assert decode(decoder, prompts) == expected


def test_batches_longer_than_the_window_take_the_plain_loop() -> None:
    model = model_of("mistral")  # looks back over 12 tokens
    recorder = TapeRecorder()
    decoder = static_decoder(model, recorder=recorder)
    for new in (6, NEW, 6):
        expected = [reference(model, prompt, new) for prompt in MIXED[:2]]
        assert decode(decoder, MIXED[:2], Sampling(new)) == expected
    assert recorder.warmed + recorder.replayed == 2 * 5


@pytest.mark.parametrize("sampling", [Sampling(NEW, 1.0, seed=5), Sampling(NEW, 1.5, 0.9, 40, seed=2**64 - 3)])
def test_samples_are_the_plain_loop_s(sampling: Sampling) -> None:
    model = model_of("qwen2")
    decoder = static_decoder(model, recorder=TapeRecorder())
    expected = decode(decoder_of(model), MIXED, sampling)
    for _ in range(WARM_UPS + 1):
        assert decode(decoder, MIXED, sampling) == expected
    other = Sampling(NEW, sampling.temperature, sampling.top_p, sampling.top_k, seed=sampling.seed - 1)
    tapes = decoder.recorder.tapes  # type: ignore[union-attr]
    count = len(tapes)
    assert decode(decoder, MIXED, other) == decode(decoder_of(model), MIXED, other) != expected
    assert len(tapes) == count, "a seed is no reason to capture again"
    assert decode(decoder, MIXED) == [reference(model, prompt) for prompt in MIXED]
    end_ids = tuple(row[3] for row in expected[:4])
    ending = static_decoder(model, end_ids)
    ending.check_every = 1
    seen = shapes_of(ending)
    assert cut(decode(ending, MIXED, sampling), end_ids) == cut(expected, end_ids)
    assert len(seen) == NEW - 1
    assert seen[-1][0] < seen[0][0], "no row has left for another place"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_repeats(dtype: torch.dtype) -> None:
    model = build_model("llama").to(dtype)
    decoder = static_decoder(model, recorder=TapeRecorder())
    first = decode(decoder, MIXED)
    assert decode(decoder, MIXED) == first
    assert decode(static_decoder(model), MIXED) == first
    assert [row[:2] for row in first] == [reference(model, prompt, new=2) for prompt in MIXED]


def test_the_engine_captures_on_cuda_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(model, device="cpu")
    assert not isinstance(engine.decoder, GraphDecoder)
    recorder = TapeRecorder()
    monkeypatch.setattr("estune.engines.transformers.CudaRecorder", lambda device: recorder)
    monkeypatch.setattr("estune.engines.transformers.unfusable", lambda model: "it is not on a CPU")
    engine.device = torch.device("cuda")
    assert not isinstance(engine.make_decoder(cuda_graphs=False), GraphDecoder)
    engine.decoder = engine.make_decoder(cuda_graphs=True)
    prompts = engine.encode(["a", "a longer prompt", "and another"])
    found = [completion.token_ids for completion in engine.generate(prompts, Sampling(NEW))]
    assert found == [reference(engine.model, prompt, end_ids=tuple(engine.end_ids)) for prompt in prompts]
    assert recorder.replayed
    monkeypatch.setattr("estune.engines.transformers.uncapturable", lambda model: "it cannot")
    assert not isinstance(engine.make_decoder(cuda_graphs=True), GraphDecoder)


def test_sizes() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 129)] == [1, 2, 4, 4, 8, 256]
    assert [first_rows(n) for n in (1, 3, 8, 9, 200, 1000)] == [1, 4, 8, 16, 200, 1000]
    assert sorted({round_up(n, 128) for n in range(1, 1025)}) == [128, 256, 384, 512, 768, 1024]
    assert all(round_up(n, 128) >= n for n in range(1, 5000))


def test_models_that_may_wait_for_the_device_are_not_captured() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in (uncapturable(build_model("llama", rope_parameters=rope)) or "")
    assert "experts" in (uncapturable(model_of("qwen3_next")) or "")


def test_steps_that_wait_for_the_device_are_refused_by_the_tape() -> None:
    decoder = static_decoder(model_of("qwen2"), recorder=TapeRecorder())
    forward = decoder.forward
    decoder.forward = lambda *call: forward(*call) + float(call[0].sum())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="capturing"):
        decode(decoder, EVEN)


@needs_cuda
@pytest.mark.parametrize("name", PLAIN)
def test_captured_steps_equal_generate_on_cuda(name: str) -> None:
    model = copy.deepcopy(with_window(name)).cuda()
    plain = [reference(model, prompt) for prompt in MIXED]
    end_ids = tuple({plain[0][4], plain[2][9], plain[3][0]})
    decoder = GraphDecoder(model, end_ids, 0, CudaRecorder(model.device))
    for member in range(4):
        torch.manual_seed(member)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for prompts in (MIXED, PREFIXED, EVEN):
            expected = [reference(model, prompt, end_ids=end_ids) for prompt in prompts]
            assert cut(decode(decoder, prompts), end_ids) == expected
    assert decoder.replays


@needs_cuda
def test_sampling_is_captured_on_cuda() -> None:
    model = build_model("qwen2").cuda()
    decoder = GraphDecoder(model, [], 0, CudaRecorder(model.device))
    for seed in (1, 2, 1):
        sampling = Sampling(NEW, 1.0, 0.9, 40, seed)
        expected = decode(decoder_of(model), MIXED, sampling)
        for _ in range(2):
            assert decode(decoder, MIXED, sampling) == expected
    assert decoder.replays


@needs_cuda
def test_the_engine_gives_the_same_with_and_without_graphs_on_cuda(model: Path) -> None:
    found = []
    for cuda_graphs in (True, False):
        engine = TransformersEngine(model, device="cuda", cuda_graphs=cuda_graphs)
        assert isinstance(engine.decoder, GraphDecoder) == cuda_graphs
        prompts = engine.encode(["a", "a longer prompt", "and another"] * 30)
        found.append([engine.generate(prompts, Sampling(64)) for _ in range(5)])
    assert found[0] == found[1]


def fail_to_capture() -> None:
    """For a process of its own: a capture that fails leaves PyTorch's allocator unusable."""
    model = build_model("qwen2").cuda()
    decoder = GraphDecoder(model, [], 0, CudaRecorder(model.device))
    forward, stream = decoder.forward, torch.cuda.current_stream()
    decoder.forward = lambda *call: forward(*call) + float(call[0].sum())  # type: ignore[method-assign]
    with pytest.raises(EstuneError, match="cuda_graphs: .*capturing.*set cuda_graphs to false"):
        decode(decoder, EVEN)
    assert torch.cuda.current_stream() == stream


@needs_cuda
def test_a_capture_that_fails_says_what_to_do_on_cuda() -> None:
    code = "from tests.engines.test_graph import fail_to_capture; fail_to_capture()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "false or lower batch_size"),
        (RuntimeError("it waits"), "false"),
    ],
)
def test_a_capture_that_fails_says_what_to_do(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> None:
        raise error

    for name in ("Stream", "graph_pool_handle", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    with pytest.raises(EstuneError, match=f"set cuda_graphs to {remedy}$"):
        CudaRecorder(torch.device("cuda")).record(step)
