"""The probe on real perturbed models: what it measures, what it recommends, what it warns of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estune.completion import Completion, Sampling
from estune.config import Config
from estune.engines.progress import Progress
from estune.errors import EstuneError
from estune.es.strategy import Member, mean_and_std
from estune.grading.grading import Grading
from estune.pool.local import LocalPool, open_local_pool
from estune.study.probe import probe, probe_parts
from estune.study.probed import Level, Probe, best_part, recommend, rows_of_parts
from estune.tasks.base import Stage
from tests.runs import make_config, make_task
from tests.visions import picture, save_vision


def level(sigma: float, mean: float, spread: float, kept: float = 1.0, *, collapsed: bool = False) -> Level:
    return Level(sigma, [mean - spread, mean + spread], mean, spread, mean + spread, 0.3, kept, 0.5, 0.0, collapsed)


def test_the_largest_sigma_that_keeps_half_and_tells_members_apart_is_recommended() -> None:
    levels = [
        level(0.01, 0.30, 0.00),
        level(0.02, 0.30, 0.01),
        level(0.04, 0.25, 0.04, 0.8),
        level(0.08, 0.10, 0.05, 0.3),
        level(0.16, 0.00, 0.02, 0.0, collapsed=True),
    ]
    assert recommend(levels, 0.3, 0.0)[0] == 0.04
    # Where the same weights differ by as much, only a wider spread says anything.
    assert recommend(levels[:4], 0.3, 0.019)[0] == 0.04
    assert recommend(levels[1:2], 0.3, 0.006)[0] is None
    assert recommend(levels[3:], 0.3, 0.0)[0] == 0.08  # all that is left, with a warning in its reason
    assert "smaller" in recommend(levels[3:], 0.3, 0.0)[1]


def test_a_base_that_earns_nothing_is_probed_where_members_differ_most() -> None:
    levels = [level(0.01, 0.0, 0.0, math.nan), level(0.02, 0.02, 0.02, math.nan), level(0.04, 0.01, 0.01, math.nan)]
    assert recommend(levels, 0.0, 0.0)[0] == 0.02


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Config:
    return make_config(tmp_path / "never", model, prompts_per_step=12, threads=1)


def test_members_of_a_model_that_sees_are_shown_pictures(tmp_path: Path) -> None:
    rows = [{"prompt": "How many?", "image": picture(n, n)} for n in range(1, 9)]
    task = replace(make_task(), train=rows[2:], evaluation=rows[:2])
    config = make_config(tmp_path / "never", save_vision(tmp_path / "model", "llava"), prompts_per_step=4, threads=1)
    found = probe(config, task=task, sigmas=[1e-7, 0.3], members=3)
    assert [level.spread > 0 for level in found.levels] == [False, True]
    blind = replace(task, train=[{"prompt": row["prompt"]} for row in rows[2:]])
    assert probe(config, task=blind, sigmas=[1e-7], members=3).base != found.base


def test_it_measures_what_perturbations_do(config: Config, tmp_path: Path) -> None:
    found = probe(config, task=make_task(vowels), sigmas=[1e-7, 0.02, 0.3], members=4)
    assert isinstance(found, Probe)
    assert found.noise == 0.0  # greedy decoding repeats
    assert (found.prompts, found.members) == (12, 4)
    tiny, some, much = found.levels
    assert tiny.rewards == [found.base] * 4
    assert (tiny.changed, tiny.spread) == (0.0, 0.0)
    assert not found.tells(tiny)
    assert some.changed > 0.3
    assert some.changed <= much.changed
    assert len(set(some.rewards)) > 1
    assert found == probe(config, task=make_task(vowels), sigmas=[0.3, 1e-7, 0.02], members=4)
    assert not (tmp_path / "never").exists()  # it writes nothing
    assert json.loads(json.dumps(found.as_json()))["levels"][1]["sigma"] == 0.02
    assert len(found.lengths) == found.prompts
    assert min(found.lengths) >= 1
    assert [row[0] for row in found.rows()] == ["sigma", "1e-07", "0.02", "0.3"]


def test_parts_of_a_model_are_probed_one_by_one(config: Config) -> None:
    arguments: dict[str, Any] = {"task": make_task(vowels), "sigmas": [0.02, 0.1], "members": 3}
    told: list[tuple[str, Probe]] = []
    found = probe_parts(config, ["*embed*", "*.mlp.*"], lambda *part: told.append(part), **arguments)
    assert told == list(found.items())  # each as it comes, so that none is lost to who does not wait for all
    for part in ("*embed*", "*.mlp.*"):
        alone = probe(config.model_copy(update={"train_parameters": part}), **arguments)
        assert found[part].levels == alone.levels
    assert found["*embed*"].levels != found["*.mlp.*"].levels
    assert found["*embed*"].base == found["*.mlp.*"].base
    with pytest.raises(EstuneError, match=r"no parameter's name fits the pattern '\*elsewhere\*'"):
        probe_parts(config, ["*.mlp.*", "*elsewhere*"], task=make_task(unreachable), sigmas=[0.02])
    integers = config.model_copy(update={"weights": "int4", "weights_group_size": 16})
    with pytest.raises(EstuneError, match=r"\*norm\* leaves no matrix to train, and only matrices can be integers"):
        probe_parts(integers, ["*.mlp.*", "*norm*"], task=make_task(unreachable), sigmas=[0.02])


def unreachable(completions: list[str], **_: Any) -> list[float]:
    raise AssertionError


def found_of(best: float, *, sigma: float | None = 0.02, noise: float = 0.0) -> Probe:
    """A probe of a base that earns 0.5, with one size."""
    return Probe("m", "t", 4, 2, 0.5, noise, [level(0.02, best - 0.1, 0.1)], sigma, "", [])


def test_the_best_part_is_that_of_the_member_that_earns_most() -> None:
    found = {"a": found_of(0.6), "b": found_of(0.9), "c": found_of(1.0, sigma=None)}  # none of c's sizes will do
    assert best_part(found) == "b"
    assert best_part({"a": found_of(0.6, noise=0.06)}) is None  # within chance
    assert best_part({"a": found_of(0.5)}) is None
    assert best_part({"c": found["c"]}) is None
    table = rows_of_parts(found)
    assert [row[:2] for row in table] == [["part", "sigma"], ["a", "0.02"], ["b", "0.02"], ["c", "none"]]
    assert {len(row) for row in table} == {9}


def test_what_is_no_longer_right_is_lost_whatever_it_earns(config: Config) -> None:
    """A reward that any text earns tells nothing of a model that has forgotten all; its accuracy does."""
    said: list[str] = []

    def right(completions: list[str], **_: Any) -> list[float]:
        said.extend([] if said else completions)  # what the base says comes first
        return [float(text in said) for text in completions]

    def brief(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(text)) for text in completions]

    task = replace(make_task(right, brief), reward_weights=[0.0, 1.0])
    kind, cruel = probe(config, task=task, sigmas=[1e-7, 0.3], members=4).levels
    assert (kind.accuracy, kind.kept, kind.collapsed) == (1.0, 1.0, False)
    assert cruel.changed == 1.0
    assert cruel.accuracy < 0.1
    assert cruel.kept <= cruel.accuracy
    assert cruel.collapsed
    blind = replace(task, evaluation=[], accuracy=None)
    cruel = probe(config, task=blind, sigmas=[1e-7, 0.3], members=4).levels[1]
    assert math.isnan(cruel.accuracy)


def test_members_are_those_that_a_pool_evaluates(config: Config) -> None:
    """Any pool will do, and it is left open and unperturbed."""
    pool = open_local_pool(config)
    watched = Watched(pool)
    try:
        before = pool.describe().fingerprint
        found = probe(config, task=make_task(vowels), pool=watched, sigmas=[0.02, 0.04], members=3, prompts=5)
        assert pool.describe().fingerprint == before
    finally:
        pool.close()
    assert found == probe(config, task=make_task(vowels), sigmas=[0.02, 0.04], members=3, prompts=5)
    assert watched.sigmas == [0.02, 0.04]
    assert watched.members[0] == watched.members[1]  # the same directions at every size
    assert watched.prompts == {5}


class Watched:
    """A pool that notes what it is asked."""

    def __init__(self, pool: LocalPool) -> None:
        self.pool, self.sigmas, self.members, self.prompts = pool, [], [], set()

    def evaluate(self, members: Sequence[Member], sigma: float, ids: Any, sampling: Sampling) -> Iterator[Any]:
        self.sigmas.append(sigma)
        self.members.append(list(members))
        self.prompts.add(len(ids))
        # Members may come back in any order.
        yield from reversed(list(self.pool.evaluate(members, sigma, ids, sampling)))

    def progress(self) -> Progress:
        return self.pool.progress()

    def generate(self, ids: Any, sampling: Sampling) -> list[Completion]:
        self.prompts.add(len(ids))
        return self.pool.generate(ids, sampling)


def test_rewards_are_graded_as_in_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Grading] = []

    def close(grading: Grading) -> None:
        opened.append(grading)

    monkeypatch.setattr(Grading, "close", close)

    def raises_once(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 4:
            raise ValueError("no")
        return vowels(completions)

    calls: list[int] = []
    with pytest.raises(EstuneError, match="raises_once raised ValueError: no"):
        probe(config, task=make_task(raises_once), sigmas=[0.02], members=2)
    calls.clear()
    lenient = config.model_copy(update={"reward_errors": "exclude"})
    found = probe(lenient, task=make_task(raises_once), sigmas=[0.02], members=2)
    assert len(found.levels[0].rewards) == 1
    assert [grading.errors for grading in opened] == ["raise", "exclude"]  # one for all that is graded


def test_of_a_curriculum_it_asks_the_first_stages_rows(config: Config) -> None:
    asked: set[str] = set()

    def note(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        asked.update(prompts)
        return vowels(completions)

    task = make_task(note, stages=[Stage([3, 5, 7], until_step=2), Stage([0, 1])])
    assert probe(config, task=task, sigmas=[0.02], members=2).prompts == 3
    assert asked == {task.train[i]["prompt"] for i in (3, 5, 7)}


def test_equal_rewards_are_no_noise_though_their_deviation_is_rounded(config: Config) -> None:
    def same(completions: list[str], **_: Any) -> list[float]:
        return [0.00019] * len(completions)

    found = probe(config, task=make_task(same), sigmas=[0.02], members=2, prompts=1)
    assert mean_and_std([0.00019] * 3)[1] > 0
    assert found.noise == 0.0


def test_sampling_has_a_noise_floor(config: Config) -> None:
    found = probe(
        config.model_copy(update={"temperature": 1.0}), task=make_task(vowels), sigmas=[1e-7], members=4, repeats=4
    )
    assert found.noise > 0
    assert found.sigma is None  # members at such a sigma differ by chance, if at all
    assert any("nothing to learn" in warning for warning in found.warnings)


def test_it_warns_where_nothing_can_be_learned(config: Config) -> None:
    def same(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    coarse = probe(config, task=make_task(same), sigmas=[0.05, 0.1], members=3)
    assert coarse.sigma is None
    assert any("too coarse" in warning for warning in coarse.warnings)
    small = probe(config, task=make_task(vowels), sigmas=[1e-8, 1e-7], members=3)
    assert small.sigma is None
    assert any("try above 1e-07" in warning for warning in small.warnings)


def test_it_warns_where_every_size_destroys_the_model(config: Config) -> None:
    good = probe(config, task=make_task(vowels), sigmas=[0.02], members=2)
    base: list[str] = []

    def like_the_base(completions: list[str], **_: Any) -> list[float]:
        """1 for what the base says: the first batch that is graded."""
        if not base:
            base.extend(completions)
        return [float(text == b) for text, b in zip(completions, base, strict=True)]

    found = probe(config, task=make_task(like_the_base), sigmas=[10.0, 20.0], members=4)
    assert found.base == 1.0
    assert all(one.collapsed and one.kept < 0.1 for one in found.levels)
    assert any("destroys the model: try below 10" in warning for warning in found.warnings)
    assert not good.levels[0].collapsed


def test_failed_members_are_counted_and_a_base_without_reward_is_refused(config: Config) -> None:
    calls = []

    def fails_later(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [math.nan if len(calls) > 3 else float(len(text)) for text in completions]

    found = probe(config, task=make_task(fails_later), sigmas=[0.02], members=2)
    assert any("2 of 2 members have no reward" in warning for warning in found.warnings)
    with pytest.raises(EstuneError, match="base model's answers have no reward"):
        probe(config, task=make_task(fails_later), sigmas=[0.02], members=2)


@pytest.mark.parametrize(
    "arguments", [{"members": 1}, {"repeats": 1}, {"prompts": 0}, {"sigmas": [0.0]}, {"sigmas": []}]
)
def test_bad_arguments_are_refused(config: Config, arguments: dict[str, Any]) -> None:
    with pytest.raises(EstuneError, match="above 0|a spread takes"):
        probe(config, task=make_task(), **arguments)


def test_its_note_says_which_one_is_recommended() -> None:
    levels = [level(0.01, 0.3, 0.0), level(0.02, 0.3, 0.01), level(0.04, 0.0, 0.0, 0.0, collapsed=True)]
    found = Probe("m", "t", 5, 2, 0.3, 0.0, levels, 0.02, "", [])
    assert [row[-1] for row in found.rows()] == ["", "members alike", "recommended", "collapsed"]
    assert found == replace(found)


def test_an_accuracy_is_in_percent_where_it_is_a_share() -> None:
    one = level(0.02, 0.3, 0.1)
    found = Probe("m", "t", 5, 2, 0.3, 0.0, [replace(one, accuracy=-11.0)], 0.02, "", [])
    assert found.rows()[1][4] == "-11"
    assert replace(found, levels=[replace(one, accuracy=0.25)], share=True).rows()[1][4] == "25%"
