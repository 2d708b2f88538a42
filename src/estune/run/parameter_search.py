"""Parameter search for other programs: a model, a strategy and a pool behind ask, evaluate, tell, best and save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from estune.charts.words import amount
from estune.completion import Completion, Prompt
from estune.config import Config
from estune.engines.tokenizer import open_encoder
from estune.errors import EstuneError
from estune.es.strategy import Member, Strategy, Update, member_seed
from estune.files import make_folder
from estune.journal.journal import FILE, Journal
from estune.journal.records import SEARCH, StepRecord
from estune.pool.base import Pool
from estune.pool.open import open_pool, with_resources
from estune.run.make import make_header, make_sampling, make_strategy
from estune.weights.adapted import open_checkpoint

LONGEST = 1024  # tokens of a prompt that a pool is opened for, if nothing else is said


class Engines:
    """Engines that several searches take turns on: islands, each with a base of its own.

    Whose turn it is has its base rebuilt there, from seeds and coefficients: what a switch costs is a replay of its
    steps.

    Args:
        config: the model, and where it runs; settings of tasks and runs are not looked at.
        longest: tokens of the longest prompt.
    """

    def __init__(self, config: Config, *, longest: int = LONGEST) -> None:
        self.config = with_resources(config)
        self.encoder = open_encoder(self.config)
        self.pool: Pool = open_pool(self.config, longest)
        self.trained = self.pool.describe()
        self._base = open_checkpoint(self.config.model, self.config.adapter).path
        self._turn: ParameterSearch | None = None

    def take(self, search: ParameterSearch) -> Pool:
        """The pool, with this search's weights in it."""
        if self._turn is not search:
            found = self.pool.rebuild(search.journal.history, (0, self._base))
            if found != search.journal.fingerprint():
                raise EstuneError(
                    f"{search.run}: its {amount(len(search.journal.history), 'steps')} give fingerprint {found} here, "
                    f"its journal says {search.journal.fingerprint()}; go on where it was begun"
                )
            self._turn = search
        return self.pool

    def close(self) -> None:
        """End the engines."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ParameterSearch:
    """One search over the weights of a model, step by step, its journal on disk: `estune replay` and `log` read it.

    The strategy is the settings', or any other of one's own: an object with `ask` and `tell`, as `Strategy` has them. A
    directory with a journal is gone on with.

    Args:
        engines: what generates; several searches can share it.
        output_dir: of the journal.
        strategy: by default the one that the settings describe.
        seed: of its perturbations, if the settings' strategy is not to draw those of another search.
        start: a search whose weights, after all its steps, this one begins with.

    Raises:
        EstuneError: for a journal over another model.
    """

    def __init__(
        self,
        engines: Engines,
        output_dir: str | Path,
        *,
        strategy: Strategy | None = None,
        seed: int | None = None,
        start: ParameterSearch | None = None,
    ) -> None:
        self.run = Path(output_dir)
        self._engines = engines
        self._config = engines.config if seed is None else engines.config.model_copy(update={"seed": seed})
        self.journal: Journal
        """All that it has done so far."""
        parent = None if start is None else start.journal
        if (self.run / FILE).exists():
            self.journal = Journal.resume(self.run)
            self._check()
        else:
            make_folder(self.run)
            fingerprint = engines.trained.fingerprint if parent is None else parent.fingerprint()
            header = make_header(self._config, engines.trained, self.run, fingerprint, SEARCH)
            self.journal = Journal.create(self.run, header, parent)
        self.strategy: Strategy = strategy or make_strategy(self._config, self.journal)
        if strategy is not None:
            strategy.recall([record.update for record in self.journal.steps], self.journal.state)
        self._sigma = self.strategy.sigma

    def ask(self) -> list[Member]:
        """The members to evaluate in this step."""
        self._sigma = self.strategy.sigma
        return self.strategy.ask()

    def evaluate(self, members: Sequence[Member], prompts: Sequence[Prompt]) -> list[list[Completion]]:
        """What each member makes of the prompts, texts or messages: `[members][prompts]`."""
        pool = self._engines.take(self)
        ids = self._engines.encoder.encode(prompts)
        sampling = make_sampling(self._engines.config, member_seed(self.strategy.seed, self.strategy.step, 1 << 23))
        found = dict(pool.evaluate(members, self._sigma, ids, sampling))
        return [found[i].completions for i in range(len(members))]

    def complete(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """What the search's own weights make of the prompts: those of no member."""
        pool = self._engines.take(self)
        return pool.generate(self._engines.encoder.encode(prompts), make_sampling(self._engines.config))

    def tell(self, rewards: Sequence[float | None], **metrics: float) -> Update:
        """Learn from the members' rewards, in the order of `ask`; the step is on disk when this returns.

        Args:
            rewards: one a member, the larger the better; None for one that has failed.
            metrics: kept with the step.
        """
        pool = self._engines.take(self)
        rate = self.strategy.learning_rate
        update = replace(self.strategy.tell(rewards), sigma=self._sigma)
        fingerprint = pool.apply(update)
        record = StepRecord(update, rate, list(rewards), [], fingerprint, metrics, state=self.strategy.state())
        self.journal.append_step(record)
        return update

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the highest mean reward of its members, from 1, and that reward; None before the first.

        It is of the weights that the step began with: those after the step before.
        """
        found = []
        for record in self.journal.steps:
            known = [r for r in record.of_members if r is not None]
            if known:
                found.append((sum(known) / len(known), -record.step))
        return (1 - max(found)[1], max(found)[0]) if found else None

    def save(self, path: str | Path, dtype: str | None = None) -> Path:
        """Write the search's weights as a checkpoint; in the type of the base weights, if no other is given."""
        self._engines.take(self).save(Path(path), dtype or self._engines.trained.dtype)
        return Path(path)

    def close(self) -> None:
        """Close the journal, as finished."""
        self.journal.append_end("finished")
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.journal.close()

    def _check(self) -> None:
        trained, header = self._engines.trained, self.journal.header
        pairs: list[tuple[str, Any, Any]] = [
            ("base model", trained.base_hash, header.base_hash),
            ("base weights", trained.dtype, header.dtype),
            ("live weights", trained.live_dtype, header.live_dtype),
        ]
        for what, here, there in pairs:
            if here != there:
                self.journal.close()
                raise EstuneError(f"{self.run}: its {what}: {there}; here: {here}; go on with what it was begun with")
