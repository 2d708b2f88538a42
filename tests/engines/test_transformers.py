"""The engine from a directory on disk: prompts, completions, and what it refuses."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines import transformers as engine_module
from estune.engines.decode import Decoder
from estune.engines.generate import GenerateDecoder
from estune.engines.progress import OWN
from estune.engines.tokenizer import open_encoder
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.models import SPECIAL, build_model, build_tokenizer, save_model

PROMPTS = ["a", "count down from 9", "yes?", "the quick brown fox jumps", "12 + 30 =", "9 9 9"]
END = SPECIAL.index("<|end|>")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture
def engine(directory: Path) -> TransformersEngine:
    return TransformersEngine(directory)


@functools.cache
def judge(directory: str) -> Any:
    """The same model, as transformers alone loads and runs it."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reference(engine: TransformersEngine, ids: list[int], new: int) -> list[int]:
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=engine.end_ids, pad_token_id=0)
    prompt = torch.tensor([ids])
    found = judge(engine.name).generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return list(found[0, len(ids) :].tolist())


@pytest.mark.parametrize("token", [-1, 320, 10**7])
def test_tokens_that_the_model_does_not_have_are_refused(engine: TransformersEngine, token: int) -> None:
    with pytest.raises(EstuneError, match=r"prompt 1: token .* is none of the 320"):
        engine.generate([[5], [7, token]], Sampling(2))


def test_completions_equal_generate_in_the_order_of_the_prompts(engine: TransformersEngine) -> None:
    ids = engine.encode(PROMPTS)
    completions = engine.generate(ids, Sampling(24))
    assert [c.token_ids for c in completions] == [reference(engine, row, 24) for row in ids]
    for completion in completions:
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.finished == (completion.token_ids[-1] == END)
        assert END not in completion.token_ids[:-1]
    assert engine.generate([], Sampling(24)) == []


@pytest.mark.parametrize(("name", "temperature"), [("qwen2", 0.0), ("qwen2", 0.8), ("mamba", 0.8)])
def test_a_streamed_completion_is_the_one_that_generate_gives(tmp_path: Path, name: str, temperature: float) -> None:
    engine = TransformersEngine(save_model(tmp_path, name))
    (ids,) = engine.encode(["12 + 30 ="])
    sampling = Sampling(12, temperature, seed=3)
    told: list[str] = []
    completion = engine.stream(ids, sampling, told.append)
    assert [completion] == engine.generate([ids], sampling)
    assert len(told) > 2
    assert told.pop() == completion.text
    assert all(completion.text.startswith(text) and "\ufffd" not in text[-1:] for text in told)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 64])
def test_batch_size_changes_nothing(engine: TransformersEngine, batch_size: int) -> None:
    ids = engine.encode(PROMPTS)
    expected = engine.generate(ids, Sampling(16))
    engine.batch_size = batch_size
    assert engine.generate(ids, Sampling(16)) == expected


RULES = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "suppress_tokens": list(range(9, 300)),
    "begin_suppress_tokens": list(range(9, 300)),
    "bad_words_ids": [[token] for token in range(9, 300)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "sequence_bias": [[[9], 50.0]],
    "exponential_decay_length_penalty": [1, 2.0],
    "guidance_scale": 2.0,
    "stop_strings": ["a"],
    "num_beams": 3,
}


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "mamba"])  # fused, over the model's forward, by `generate`
@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_rules_of_a_generation_config_are_told_and_not_obeyed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_model(tmp_path / "model", name)
    engine = TransformersEngine(model)
    ids = [row[:4] for row in engine.encode(PROMPTS[1:])]
    expected = engine.generate(ids, Sampling(8))
    assert [c.token_ids for c in expected] == [reference(engine, row, 8) for row in ids]
    file = model / "generation_config.json"
    settings = json.loads(file.read_text()) | {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.0}
    file.write_text(json.dumps(settings))
    open_encoder(Config(model=str(model)))
    assert not [m for m in caplog.messages if "generation config" in m]
    file.write_text(json.dumps(settings | RULES))
    open_encoder(Config(model=str(model)))
    (told,) = [m for m in caplog.messages if "generation config" in m]
    assert all(f"{rule}," in told or f"{rule};" in told for rule in RULES)
    assert TransformersEngine(model).generate(ids, Sampling(8)) == expected


@pytest.mark.parametrize("new", [3, 9])
def test_a_long_prompt_does_not_turn_the_angles_of_short_ones(tmp_path: Path, new: int) -> None:
    """LongRoPE: texts of up to 32 tokens are short. Some are, some become long on the way, some are from the start."""
    engine = TransformersEngine(save_model(tmp_path / "model", "phi3_longrope"))
    prompts = [list(range(40, 40 + length)) for length in (2, 5, 13, 13, 29, 30, 31, 32, 33, 50)]
    found = engine.generate(prompts, Sampling(new))
    assert [c.token_ids for c in found] == [reference(engine, prompt, new) for prompt in prompts]


def test_angles_that_follow_the_length_are_of_texts_that_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    engine = TransformersEngine(
        save_model(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=32)
    )
    prompts = [list(range(40, 40 + length)) for length in (2, 13, 24)]
    found = engine.generate(prompts, Sampling(8))
    assert [c.token_ids for c in found] == [reference(engine, prompt, 8) for prompt in prompts]
    with pytest.raises(EstuneError, match="go beyond the 32 positions"):
        engine.generate([*prompts, list(range(40, 65))], Sampling(8))


def test_completion_ends_with_any_end_token(directory: Path, tmp_path: Path) -> None:
    engine = TransformersEngine(directory)
    ids = engine.encode(PROMPTS)
    free = engine.generate(ids, Sampling(24))
    other = free[1].token_ids[6]
    for source in ("config", "generation_config"):
        target = save_model(tmp_path / source)
        path = target / f"{source}.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | {"eos_token_id": [other] if source == "config" else [END, other]}))
        ending = TransformersEngine(target)
        assert ending.end_ids == sorted({END, other})
        completions = ending.generate(ids, Sampling(24))
        assert completions[1].finished
        assert completions[1].token_ids == free[1].token_ids[: free[1].token_ids.index(other) + 1]
        assert [c.token_ids for c in completions] == [reference(ending, row, 24) for row in ids]


def test_completion_cut_by_max_new_tokens_is_not_finished(engine: TransformersEngine) -> None:
    ids = engine.encode(PROMPTS[:2])
    cut = engine.generate(ids, Sampling(1))
    assert [len(c.token_ids) for c in cut] == [1, 1]
    assert [c.finished for c in cut] == [c.token_ids == [END] for c in cut]


def test_end_token_counts_and_leaves_the_text(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([[40, 41, END, 7], [40, 41, 42, END], [40, 41, 42, 43]])
    monkeypatch.setattr(engine.decoder, "run", lambda prompts, indices, sampling: rows)
    text = engine.tokenizer.decode
    assert engine.generate([[9]] * 3, Sampling(4)) == [
        Completion(text([40, 41]), [40, 41, END], finished=True),
        Completion(text([40, 41, 42]), [40, 41, 42, END], finished=True),
        Completion(text([40, 41, 42, 43]), [40, 41, 42, 43], finished=False),
    ]


def test_text_keeps_the_tokenizers_special_tokens_and_chat_brings_its_own(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    bos = SPECIAL.index("<|bos|>")
    begin = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.chat_template = "<|bos|>" + str(tokenizer.chat_template)
    engine = TransformersEngine(save_model(tmp_path, "llama", tokenizer=tokenizer))
    system = {"role": "system", "content": "be brief"}
    user = {"role": "user", "content": "hi"}
    opened = {"role": "assistant", "content": "Let me"}
    text, chat, proceed = engine.encode(["hi", [system, user], [user, opened]])
    assert engine.tokenizer.decode(text) == "<|bos|>hi"
    assert engine.tokenizer.decode(chat) == "<|bos|><|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert engine.tokenizer.decode(proceed) == "<|bos|><|user|>hi<|end|><|assistant|>Let me"
    assert text.count(bos) == chat.count(bos) == 1


def test_tokenizer_without_pad_token_serves(tmp_path: Path) -> None:
    engine = TransformersEngine(save_model(tmp_path, tokenizer=build_tokenizer(pad=False)))
    ids = engine.encode(PROMPTS)
    assert [c.token_ids for c in engine.generate(ids, Sampling(12))] == [reference(engine, row, 12) for row in ids]


def test_auto_dtype_is_float32_on_a_cpu(tmp_path: Path) -> None:
    build_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    assert TransformersEngine(tmp_path, device="cpu").model.dtype == torch.float32
    half = TransformersEngine(tmp_path, dtype="bfloat16", device="cpu")
    assert half.model.dtype == torch.bfloat16
    assert all(len(c.token_ids) == 8 or c.finished for c in half.generate(half.encode(PROMPTS), Sampling(8)))
    assert not any(p.requires_grad for p in half.model.parameters())


def test_weights_stay_where_they_are(engine: TransformersEngine) -> None:
    addresses = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    engine.generate(engine.encode(PROMPTS), Sampling(8))
    assert {name: p.data_ptr() for name, p in engine.model.named_parameters()} == addresses


def test_two_engines_in_two_threads_do_not_disturb_each_other(engine: TransformersEngine) -> None:
    twin = TransformersEngine(engine.name, device="cpu")
    for parameter in twin.model.parameters():
        parameter.mul_(1.2)
    ids = engine.encode(PROMPTS * 4)
    expected = [e.generate(ids, Sampling(16)) for e in (engine, twin)]
    assert expected[0] != expected[1]
    found: list[list[Any]] = [[], []]

    def work(which: int) -> None:
        for _ in range(6):
            found[which].append((engine, twin)[which].generate(ids, Sampling(16)))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected[0]] * 6, [expected[1]] * 6]


def test_sampling_repeats_and_ignores_batches(engine: TransformersEngine) -> None:
    ids = engine.encode(PROMPTS)
    sampling = Sampling(12, temperature=0.9, top_p=0.95, top_k=50, seed=11)
    first = engine.generate(ids, sampling)
    engine.batch_size = 2
    assert engine.generate(ids, sampling) == first
    assert engine.generate(ids, Sampling(12, temperature=0.9, top_p=0.95, top_k=50, seed=12)) != first


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
def test_recurrent_model_mixes_prompt_lengths(tmp_path: Path) -> None:
    engine = TransformersEngine(save_model(tmp_path, "mamba"))
    assert isinstance(engine.decoder, GenerateDecoder)
    ids = engine.encode([*PROMPTS, "b"])
    before = OWN.now()
    assert [c.token_ids for c in engine.generate(ids, Sampling(8))] == [reference(engine, row, 8) for row in ids]
    done = OWN.now().since(before)
    assert (done.read, done.settled) == (sum(map(len, ids)), 8 * len(ids))


def test_rows_follow_memory(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(engine.decoder, Decoder)
    weights = sum(p.nbytes for p in engine.model.parameters())
    row = 2 * 3 * 2 * 16 * 50 * 4 + 12 * 320
    for total, sizes in ((weights + 4 * 5 * row, [4, 4, 4]), (weights + 4 * 12 * row, [12]), (0, [1] * 12)):
        monkeypatch.setattr(engine_module, "total_memory", lambda device, total=total: total)
        found = TransformersEngine(engine.name)
        assert [len(batch) for _, batch in found.batches([[7] * 30] * 12, 20)] == sizes
        assert [len(batch) for _, batch in found.batches([[7] * 30] * 12, 20)] == sizes


def test_settings_out_of_range(directory: Path) -> None:
    with pytest.raises(EstuneError, match="batch_size: 0"):
        TransformersEngine(directory, batch_size=0)
    with pytest.raises(EstuneError, match="dtype: 'float12' is unknown"):
        TransformersEngine(directory, dtype="float12")
    with pytest.raises(EstuneError, match="device: 'toaster' is no device"):
        TransformersEngine(directory, device="toaster")


def test_prompts_out_of_range(engine: TransformersEngine, tmp_path: Path) -> None:
    with pytest.raises(EstuneError, match="prompt 1: '' encodes to no token"):
        engine.encode(["a", ""])
    with pytest.raises(EstuneError, match="prompt 0: a conversation without messages"):
        engine.encode([[]])
    engine.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(EstuneError, match="prompt 0: the chat template of"):
        engine.encode([[{"role": "system", "content": "x"}]])
    with pytest.raises(EstuneError, match="prompt 1: no tokens"):
        engine.generate([[5], []], Sampling(4))
    with pytest.raises(EstuneError, match="prompt 1: 250 tokens and max_new_tokens 7 go beyond the 256 positions"):
        engine.generate([[5], [5] * 250], Sampling(7))
    assert len(engine.generate([[9] * 250], Sampling(6))[0].token_ids) <= 6
    for sampling in (Sampling(4, temperature=-1), Sampling(4, top_p=0), Sampling(4, top_p=1.5), Sampling(4, top_k=-2)):
        with pytest.raises(EstuneError, match="sampling: temperature"):
            engine.generate([[5]], sampling)
    with pytest.raises(EstuneError, match="max_new_tokens: 0"):
        engine.generate([[5]], Sampling(0))
    engine.tokenizer.chat_template = None
    with pytest.raises(EstuneError, match=r"prompt 0: a conversation, but the tokenizer of .* has no chat template"):
        engine.encode([[{"role": "user", "content": "x"}]])
