"""Members around one base that answer together: the best of many that were drawn, by vote or merged into one model.

Of N members theta + sigma * eps_n the k of the highest mean reward on training prompts are kept (RandOpt: arXiv
2603.12228). The vote answers with argmax_a sum_n 1[a_n = a], a_n being member n's final answer; the merged model is the
mean of their weights, theta + sigma / k * sum_n eps_n, as in model soups (arXiv 2203.05482). What is kept of it are
seeds. It leaves out answers that are equal in value and not as text: these do not vote together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from estune.charts.words import amount
from estune.completion import Completion, Sampling
from estune.config import Config, read
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.es.strategy import Member, Update, float32, member_seed
from estune.files import write_text
from estune.grading.level import refuse_level
from estune.journal.journal import Journal, is_run
from estune.journal.lines import Seed
from estune.pool.base import Pool
from estune.pool.open import open_pool, with_resources
from estune.pool.waiting import check_model, told_while, told_while_generating
from estune.run.asked import UNREACHED, first_prompts
from estune.run.begin import inherit
from estune.run.evaluate import from_here, on_this_machine, settings_for, task_for
from estune.run.graded import grade_completions
from estune.run.held_out import HeldOut, refuse_unreachable
from estune.run.make import make_grading, make_sampling, make_task
from estune.tasks.base import Task
from estune.weights.adapted import open_checkpoint
from estune.weights.policies import POLICIES


@dataclass(frozen=True)
class Ensemble:
    """Members around one base, the best first, and what they come to together.

    Attributes:
        model, base_hash: the base model, and the hash of its tensors.
        run, step: the run whose weights, after so many of its steps, the members are around; None of a plain model.
        fingerprint: of the weights that they are around.
        noise, sigma_scale, train_parameters: as the settings of these names.
        sigma: of the perturbations.
        members: seeds, 16 hexadecimal digits each.
        signs: of each member, 1 or -1.
        rewards: mean reward of each on the training prompts that it was chosen by.
        task: on which.
        tried: members that they were chosen from.
        figures: held-out metrics by who answers: `base`, `best` (the first member), `vote`, `merged`.
    """

    model: str
    base_hash: str
    run: str | None
    step: int | None
    fingerprint: str
    noise: str
    sigma_scale: dict[str, float | Literal["rms"]]
    train_parameters: str
    sigma: Annotated[float, Field(gt=0)]
    members: list[Seed]
    signs: list[Literal[1, -1]]
    rewards: list[float]
    task: str
    tried: int
    figures: dict[str, dict[str, float]]

    def write(self, path: Path) -> None:
        """Write it as JSON, some hundred bytes beside its figures."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Ensemble:
        """Read what `write` wrote.

        Raises:
            EstuneError: there is no such file, or it is none.
        """
        try:
            found = TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            raise EstuneError(f"{path}: {error.strerror}; give a file that `estune ensemble -o FILE` wrote") from error
        except ValueError as error:
            raise EstuneError(f"{path}: no ensemble that `estune ensemble -o FILE` wrote") from error
        if not found.members or not len(found.members) == len(found.signs) == len(found.rewards):
            raise EstuneError(f"{path}: members, signs and rewards are not equally many; write it anew")
        return found

    def rows(self) -> list[list[str]]:
        """Rows of a table: a heading, then one for each that answers."""
        names = {"best": "best member", "vote": f"vote of {len(self.members)}", "merged": f"{len(self.members)} merged"}
        cells = ("eval_accuracy", "eval_reward")
        return [
            ["", "accuracy", "reward"],
            *([names.get(who, who), *(f"{of[key]:.4f}" for key in cells)] for who, of in self.figures.items()),
        ]

    def asked(self) -> list[Member]:
        """The members as a pool takes them."""
        return [Member(int(seed, 16), sign) for seed, sign in zip(self.members, self.signs, strict=True)]


def ensemble(
    model: str,
    file: Path | None = None,
    overrides: list[str] | None = None,
    *,
    members: int = 64,
    top: int = 5,
    prompts: int | None = None,
    step: int | None = None,
    of_step: bool = False,
    given: Ensemble | None = None,
    save: Path | None = None,
    task: Task | None = None,
    accept_changes: bool = False,
    trust_task: bool = False,
) -> Ensemble:
    """The best of many members around a model, or a run's weights, and what they come to on the held-out set.

    Args:
        model: a run's directory, whose settings are then used, or a model.
        file, overrides: settings, on top of the run's; `sigma` is that of the members.
        members: how many are drawn and tried.
        top: how many of these are kept.
        prompts: training prompts that each answers; `prompts_per_step` by default.
        step: of a run, after how many steps; those of its best evaluation by default.
        of_step: take the members that the run itself tried after these steps, with their sigma, in place of new ones.
        given: members that were chosen before, over the same base: they are evaluated, and nothing is drawn.
        save: a directory to write the merged model to.
        task: a task of your own; by default the one the settings name.
        accept_changes, trust_task: as `evaluate_model` takes them.

    Raises:
        EstuneError: as `evaluate_model`; for numbers that make no ensemble; for members of another base.
    """
    _check_counts(members, top, prompts, save)
    settings = from_here(read(file, overrides or []))
    config = settings_for(model, settings)
    journal = Journal.read(Path(model), step) if is_run(model) else None
    if journal is None and (step is not None or of_step):
        raise EstuneError(f"{model} is no run, which has steps: leave out --step and --of-step")
    if POLICIES[config.weights].drifts:
        raise EstuneError("weights=inplace drifts, and members are to be around one base: set weights=copy")
    if journal is None:
        check_model(model)
    else:
        journal = journal if step is not None or journal.best is None else Journal.read(Path(model), journal.best.step)
        task = task_for(journal, config, settings, task, accept_changes=accept_changes, trust_task=trust_task)
    task = task or make_task(config)
    name = config.model if journal is None else journal.base_model()
    config = with_resources(on_this_machine(config, name), journal.header.live_dtype if journal else None)
    refuse_unreachable(task, config)
    refuse_level(task.reward_funcs, "ensemble", "members are judged one by one", "population")
    if not task.evaluation:
        raise EstuneError(f"task {task.name} has no evaluation set: give it one, or another task")
    with ExitStack() as opened:
        found = _Tried(config, task, journal, min(prompts or config.prompts_per_step, len(task.train)), opened)
        chosen = found.chosen(given) if given else found.choose(*_to_try(config, journal, model, members, of_step), top)
        result = replace(chosen, figures=found.figures(chosen))
        if save is not None:
            found.save(save)
    return result


def vote(answers: Sequence[Sequence[str | None]]) -> list[int]:
    """Of each prompt the member whose completion the vote takes: the first of those that gave the commonest answer.

    Of equally common answers that of the earliest member counts; where nobody has one, it is the first member.

    Args:
        answers: `[members][prompts]`, None where there is none.
    """
    found = []
    for of_prompt in zip(*answers, strict=True):
        counts = Counter(answer for answer in of_prompt if answer is not None)
        found.append(of_prompt.index(counts.most_common(1)[0][0]) if counts else 0)
    return found


def mean_of(members: Sequence[Member], sigma: float) -> Update:
    """What makes a base the mean of these members' weights."""
    each = tuple(float32(sigma * member.sign / len(members)) for member in members)
    return Update(0, tuple(members), each)


class _Tried:
    """A base in a pool, and the prompts that members answer there.

    Args:
        config, task: the settings, and the task.
        journal: of the run whose weights, after all its steps, are the base; None for the model itself.
        prompts: training prompts that members are judged by.
        opened: closes what is opened.
    """

    def __init__(self, config: Config, task: Task, journal: Journal | None, prompts: int, opened: ExitStack) -> None:
        self._config = config
        self._task = task
        self._journal = journal
        encoder = open_encoder(config)
        self._rows, self._ids = first_prompts(config, task, encoder, prompts)
        self._grading = make_grading(config, task)
        opened.callback(self._grading.close)
        self._held_out = HeldOut(task, config, encoder, self._grading)
        self._pool: Pool = open_pool(config, max([*map(len, self._ids), self._held_out.longest]))
        opened.callback(self._pool.close)
        self._trained = self._pool.describe()
        self._fingerprint = self._trained.fingerprint
        if journal is not None:
            with told_while(f"replaying {amount(len(journal.history), 'steps')}"):
                self._fingerprint = inherit(self._pool, self._trained, journal)

    def choose(self, members: Sequence[Member], sigma: float, top: int) -> Ensemble:
        """The best of these members by mean reward; of equals the earlier."""
        sampling = make_sampling(self._config, member_seed(self._config.seed, UNREACHED, 1 << 23))
        what = f"trying {amount(len(members), 'members')} on {amount(len(self._ids), 'prompts')}"
        completed = self._complete(members, sigma, self._ids, sampling, what)
        graded = [grade_completions(self._task, self._rows, each, self._grading) for each in completed]
        pairs = ((g.grades.mean, member) for g, member in zip(graded, members, strict=True))
        rewards = [(reward, member) for reward, member in pairs if reward is not None]
        if len(rewards) < top:
            raise EstuneError(f"{len(rewards)} of {len(members)} members have a reward, fewer than --top {top}")
        best = sorted(rewards, key=lambda pair: -pair[0])[:top]
        return self._ensemble(best, sigma, len(members))

    def chosen(self, given: Ensemble) -> Ensemble:
        """The same members as before, around this base.

        Raises:
            EstuneError: they were around another.
        """
        config = self._config
        for what, now, then in (
            ("base model", self._trained.base_hash, given.base_hash),
            ("weights", self._fingerprint, given.fingerprint),
            *((key, getattr(config, key), getattr(given, key)) for key in ("noise", "sigma_scale", "train_parameters")),
        ):
            if now != then:
                raise EstuneError(f"the ensemble's {what}: {then}; here: {now}; give what its members were chosen over")
        return self._ensemble(list(zip(given.rewards, given.asked(), strict=True)), given.sigma, given.tried)

    def _ensemble(self, best: Sequence[tuple[float, Member]], sigma: float, tried: int) -> Ensemble:
        journal = self._journal
        return Ensemble(
            model=self._config.model,
            base_hash=self._trained.base_hash,
            run=None if journal is None else str(journal.run),
            step=None if journal is None else len(journal.steps),
            fingerprint=self._fingerprint,
            noise=self._config.noise_mode,
            sigma_scale=self._config.sigma_scale,
            train_parameters=self._config.train_parameters,
            sigma=sigma,
            members=[f"{member.seed:016x}" for _, member in best],
            signs=[1 if member.sign > 0 else -1 for _, member in best],
            rewards=[reward for reward, _ in best],
            task=self._task.name,
            tried=tried,
            figures={},
        )

    def figures(self, found: Ensemble) -> dict[str, dict[str, float]]:
        """Held-out metrics of the base, the best member, the vote and the merged model, which then is the base."""
        members = found.asked()
        base = Member(0, 0)
        asked = self._held_out.asked
        sampling = self._held_out.sampling

        def completed(some: Sequence[Member], who: str) -> list[list[Completion]]:
            what = f"evaluating {who} on {amount(len(asked), 'prompts')}"
            return self._complete(some, found.sigma, asked, sampling, what)

        of_base, *of_members = completed([base, *members], f"the base and {amount(len(members), 'members')}")
        answering = {"base": of_base, "best": of_members[0]}
        if (answer := self._task.answer) is not None:
            taken = vote([[answer(c.text) for c in of_member] for of_member in of_members])
            answering["vote"] = [of_members[who][prompt] for prompt, who in enumerate(taken)]
        self._pool.apply(mean_of(members, found.sigma))
        (answering["merged"],) = completed([base], "the merged model")
        return {name: self._held_out.judge(each)[0] for name, each in answering.items()}

    def save(self, path: Path) -> None:
        """Write the base as it is now as a checkpoint, in the base checkpoint's type if the settings name none."""
        config = self._config
        dtype: str = config.save_dtype
        if dtype == "auto":
            own = open_checkpoint(config.model, config.adapter).type_of(self._trained.tensors)
            dtype = own or self._trained.live_dtype
        self._pool.save(path, dtype)

    def _complete(
        self, members: Sequence[Member], sigma: float, ids: Sequence[Sequence[int]], sampling: Sampling, what: str
    ) -> list[list[Completion]]:
        places = len(members) * len(ids) * sampling.max_new_tokens
        with told_while_generating(what, self._pool, len(members) * sum(map(len, ids)), places):
            found = dict(self._pool.evaluate(members, sigma, ids, sampling))
        return [found[i].completions for i in range(len(members))]


def _to_try(
    config: Config, journal: Journal | None, model: str, count: int, of_step: bool
) -> tuple[list[Member], float]:
    """Members and their sigma: new ones, or those of the step that a run took after those of its journal."""
    if not of_step:
        return [Member(member_seed(config.seed, UNREACHED, i)) for i in range(count)], config.sigma
    assert journal is not None
    if config.guided_share:
        raise EstuneError(f"{model}: guided members are more than their seeds: leave out --of-step")
    taken = Journal.read(Path(model)).steps
    done = len(journal.steps)
    if done >= len(taken):
        raise EstuneError(f"{model} has taken no step after {done}, whose members could be tried: give another --step")
    return [member for member in taken[done].update.members if member.sign], taken[done].sigma


def _check_counts(members: int, top: int, prompts: int | None, save: Path | None) -> None:
    if not 1 <= top <= members or (prompts is not None and prompts < 1):
        raise EstuneError(
            f"ensemble: --top {top} of --members {members}, --prompts {prompts}: keep one or more of those that are "
            "drawn, by one prompt or more"
        )
    if save is not None and save.exists():
        raise EstuneError(f"{save} exists already: give another directory or remove it")
