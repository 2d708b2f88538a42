"""What a run's weights are by the equations of a strategy's parts, once more in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from estune.journal.journal import Journal
from estune.journal.replay import replay
from estune.noise import reference
from tests.runs import train


def test_sigma_rises_before_it_falls_and_the_rate_with_it(model: Path, tmp_path: Path) -> None:
    courses = {"sigma_warmup_steps": 1, "sigma_scheduler_type": "linear", "min_sigma_rate": 0.25, "steps": 5}
    train(tmp_path / "together", model, learning_rate="2sigma", **courses)
    train(tmp_path / "apart", model, learning_rate=0.02, warmup_steps=3, **courses)
    together, apart = (Journal.read(tmp_path / name).steps for name in ("together", "apart"))
    sigmas = [0.5, 1.0, 0.8125, 0.625, 0.4375]  # times 0.02
    assert [step.sigma / 0.02 for step in together] == pytest.approx(sigmas)
    assert [step.learning_rate / 0.04 for step in together] == pytest.approx(sigmas)
    assert [step.learning_rate / 0.02 for step in apart] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_run_with_momentum_anchors_and_groups_is_what_the_equations_say(model: Path, tmp_path: Path) -> None:
    """The weights again in NumPy, from seeds and rewards alone."""
    changes = {"momentum": 0.5, "momentum_window": 1, "anchor_decay": 0.5, "anchor_l1": 0.05}
    train(tmp_path / "run", model, save_dtype="float32", prompt_groups=2, prompts_per_step=3, **changes)
    origin = {name: t.astype(np.float64).ravel() for name, t in load_file(model / "model.safetensors").items()}
    theta = {name: t.copy() for name, t in origin.items()}
    last: list[tuple[int, float]] = []
    moved = 0.0
    for record in Journal.read(tmp_path / "run").steps:
        assert len(record.prompts) == 6
        rewards = np.array(record.rewards, float)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        own = [(m.seed, 0.5 * 0.02 / 4 * w) for m, w in zip(record.update.members, z, strict=True)]
        old = [(seed, 0.5 * np.exp(-moved / 0.02**2 / 2) * c) for seed, c in last]
        for name, t in theta.items():
            t += 0.5 * 0.02 * (origin[name] - t)
            t += np.clip(origin[name] - t, -0.05 * 0.02, 0.05 * 0.02)
            key = reference.tensor_id(name)
            t += sum(c * reference.normal_by_id(seed, key, 0, t.size).astype(float) for seed, c in own + old)
        last, moved = own, sum(c * c for _, c in own + old)
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, t in theta.items():
        np.testing.assert_allclose(final[name].ravel(), t, rtol=0, atol=2e-6)


def test_a_run_with_adam_and_scales_is_what_the_equations_say(model: Path, tmp_path: Path) -> None:
    """The weights again in NumPy, from seeds and rewards alone."""
    scale = {"model.norm.weight": 0.5}
    train(tmp_path / "run", model, save_dtype="float32", adam=True, adam_beta2=0.9, weight_decay=0.5, sigma_scale=scale)
    theta = {name: t.astype(np.float64).ravel() for name, t in load_file(model / "model.safetensors").items()}
    moments = {name: (np.zeros(t.size), np.zeros(t.size)) for name, t in theta.items()}
    journal = Journal.read(tmp_path / "run")
    assert journal.header.scales == scale
    for number, record in enumerate(journal.steps, 1):
        rewards = np.array(record.rewards, float)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        for name, t in theta.items():
            drawn = [
                reference.normal_by_id(m.seed, reference.tensor_id(name), 0, t.size) for m in record.update.members
            ]
            g = scale.get(name, 1.0) * np.tensordot(z, np.array(drawn, float), 1) / 4
            first = 0.9 * moments[name][0] + 0.1 * g
            second = 0.9 * moments[name][1] + 0.1 * g * g
            moments[name] = first, second
            size = np.sqrt(second / (1 - 0.9**number)) + 1e-8
            t += 0.02 / 2 * first / (1 - 0.9**number) / size - 0.02 * 0.5 * t
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, t in theta.items():
        np.testing.assert_allclose(final[name].ravel(), t, rtol=0, atol=1e-4)  # where g is next to nothing, so is v
        assert np.mean(np.abs(final[name].ravel() - t)) < 2e-6


def test_a_guided_run_is_what_the_equations_say(model: Path, tmp_path: Path) -> None:
    """The weights again in NumPy, from seeds and rewards alone, with what each member was perturbed by."""
    train(tmp_path / "run", model, save_dtype="float32", guided_share=0.4, guided_window=2, mirrored=True)
    theta = {name: t.astype(np.float64).ravel() for name, t in load_file(model / "model.safetensors").items()}
    past: list[dict[int, float]] = []  # of each step, the latest first: coefficients of its own members' noise
    for record in Journal.read(tmp_path / "run").steps:
        rewards = np.array(record.rewards, float)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        mixed: dict[int, float] = {}  # coefficients of all noise
        own: dict[int, float] = {}
        for member, weight in zip(
            record.update.members, 0.02 / 4 * z * [m.sign for m in record.update.members], strict=True
        ):
            share = 0.4 if past else 0.0
            own[member.seed] = own.get(member.seed, 0.0) + np.sqrt(1 - share) * weight
            along = reference.normal_by_id(member.seed, reference.tensor_id("guided directions"), 0, 2)
            for step, normal in zip(past, along, strict=False):
                scale = normal * np.sqrt(share / len(past)) / np.linalg.norm(list(step.values()))
                for seed, c in step.items():
                    mixed[seed] = mixed.get(seed, 0.0) + weight * scale * c
        for name, t in theta.items():
            for seed, c in (own | mixed).items():
                t += c * reference.normal_by_id(seed, reference.tensor_id(name), 0, t.size).astype(float)
        past = [own, *past][:2]
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, t in theta.items():
        np.testing.assert_allclose(final[name].ravel(), t, rtol=0, atol=2e-6)


def test_a_sharpness_aware_run_is_what_the_equations_say(model: Path, tmp_path: Path) -> None:
    """The weights again in NumPy, from seeds and rewards alone, after both steps of each pair."""
    train(tmp_path / "run", model, save_dtype="float32", sam_rho=0.5, anchor_decay=0.5)
    origin = {name: t.astype(np.float64).ravel() for name, t in load_file(model / "model.safetensors").items()}
    theta = {name: t.copy() for name, t in origin.items()}
    steps = Journal.read(tmp_path / "run").steps
    assert [record.prompts for record in steps[::2]] == [record.prompts for record in steps[1::2]]
    assert steps[0].prompts != steps[2].prompts
    assert [record.metrics["displaced"] for record in steps] == [1, 0, 1, 0]

    def added(terms: list[tuple[int, float]]) -> dict[str, Any]:
        noise = reference.normal_by_id
        places = {name: (reference.tensor_id(name), 0, t.size) for name, t in theta.items()}
        return {name: sum(c * noise(s, *place).astype(float) for s, c in terms) for name, place in places.items()}

    for number, record in enumerate(steps):
        rewards = np.array(record.rewards, float)
        z = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        seeds = [m.seed for m in record.update.members]
        if number % 2 == 0:
            theta = {name: t + 0.5 * 0.02 * (origin[name] - t) for name, t in theta.items()}
            change = added([(s, -0.5 * 0.02 * w / np.linalg.norm(z)) for s, w in zip(seeds, z, strict=True)])
        else:
            change = added([(s, 0.02 / 4 * w) for s, w in zip(seeds, z, strict=True)])
            theta = {name: t + change[name] for name, t in theta.items()}
        replay(tmp_path / "run", tmp_path / f"after {number}", step=number + 1)
        found = load_file(tmp_path / f"after {number}" / "model.safetensors")
        for name, t in theta.items():
            expected = t + change[name] if number % 2 == 0 else t
            np.testing.assert_allclose(found[name].ravel(), expected, rtol=0, atol=2e-6)
