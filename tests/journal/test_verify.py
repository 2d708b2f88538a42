"""What `verify` proves, and what it does not let pass."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estune.errors import EstuneError
from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.journal.share import pack
from estune.journal.verify import verify
from estune.run.trainer import Trainer
from estune.weights.checkpoint import Checkpoint
from tests.journal.histories import forge, write_history
from tests.journal.test_ancestors import run as train
from tests.runs import make_config, make_task


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    write_history(tmp_path / "run", model)
    return tmp_path / "run"


@pytest.mark.parametrize("weights", ["master", "split_master", "exact_inplace", "inplace"])
def test_all_that_was_recorded_is_compared(model: Path, tmp_path: Path, weights: str) -> None:
    changes = {"weights": weights, "dtype": "bfloat16", "rounding": "stochastic", "save_steps": 2}
    train(tmp_path / "a", model, steps=2, **changes)
    train(tmp_path / "b", model, steps=3, start_from=tmp_path / "a", **changes)
    heard: list[float] = []
    proof = verify(tmp_path / "b", told=heard.append)
    assert (proof.steps, proof.fingerprints, proof.missing) == (5, 6, None)
    best = Journal.read(tmp_path / "b").best
    assert best is not None
    assert proof.checkpoints == {"final": 3, "best": best.step, "checkpoint-2": 2}
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    pack(tmp_path / "b", tmp_path / "b.estune")
    alone = verify(tmp_path / "b.estune")
    assert (alone.fingerprints, alone.checkpoints, alone.sha256) == (6, {}, proof.sha256)


def test_a_step_that_gives_other_weights_is_named(run: Path) -> None:
    record = Journal.read(run).steps[1]
    coefficients = (*record.update.coefficients[:-1], record.update.coefficients[0])
    forge(run, 1, update=replace(record.update, coefficients=coefficients))
    with pytest.raises(EstuneError, match=f"the fingerprint after step 2 is .*, the journal says {record.fingerprint}"):
        verify(run)


def test_a_base_of_other_weights_is_named(run: Path) -> None:
    journal = Journal.read(run)
    journal.path.unlink()
    Journal.create(run, replace(journal.header, fingerprint="0" * 16)).close()
    with pytest.raises(EstuneError, match="of the weights that it starts from is .* the journal says 0000000000000000"):
        verify(run)


@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_bit_of_a_checkpoint_is_found(run: Path, position: int) -> None:
    tensors = sorted(Checkpoint(run / "final").tensors.values(), key=lambda t: t.offset)
    tensor = tensors[position]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + tensor.size - 1 if position else tensor.offset)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(EstuneError, match=f"final: tensor {tensor.name} is not what the journal gives after step 3"):
        verify(run)


def test_a_checkpoint_with_other_files_is_found(run: Path) -> None:
    (run / "final" / "tokenizer.json").write_text("{}")
    with pytest.raises(EstuneError, match="final is not the checkpoint that the run saved"):
        verify(run)


def test_what_is_not_trained_is_compared_too(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", model, steps=1, train_parameters="*mlp*")
    Trainer(config, task=make_task(), monitors=[]).train()
    assert "final" in verify(tmp_path / "run").checkpoints
    norm = Checkpoint(tmp_path / "run" / "final").tensors["model.norm.weight"]
    with norm.file.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.float32(3.0).tobytes())
    with pytest.raises(EstuneError, match=r"tensor model.norm.weight is not what the journal gives"):
        verify(tmp_path / "run")


def test_a_run_that_is_its_checkpoint_itself_says_of_which_step(model: Path, tmp_path: Path) -> None:
    write_history(tmp_path / "run", model)
    pulled = tmp_path / "pulled"
    replay(tmp_path / "run", pulled, 2)
    pack(tmp_path / "run", pulled / "journal.estune")
    assert verify(pulled).checkpoints == {"pulled": 2}
    norm = Checkpoint(pulled).tensors["model.norm.weight"]
    with norm.file.open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.float32(3.0).tobytes())
    with pytest.raises(EstuneError, match=r"tensor model.norm.weight is not what the journal gives after any step"):
        verify(pulled)


def test_a_cut_journal_says_so(run: Path) -> None:
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:-2]))
    shutil.rmtree(run / "final")
    assert "the journal ends after 2 of 3 steps" in str(verify(run).missing)
