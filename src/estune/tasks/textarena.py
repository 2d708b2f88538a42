"""Games of the library TextArena that one plays alone: `textarena:GuessTheNumber-v0`, `textarena:Sudoku-v0`."""

from __future__ import annotations

import difflib
import functools
import json
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import Field

from estune.errors import EstuneError, printable
from estune.grading.convention import Row
from estune.grading.rollout import FromRollout, Rollout
from estune.tasks.base import Task
from estune.tasks.options import OwnOptions, TaskOptions

PREFIX = "textarena:"
SIZE = 200
WON = "won"

# A board is a function of its seed. Evaluation's come first, then those of each seed of a run.
SPAN = 1 << 20
SEEDS = 1 << 11
_DRAWING = threading.Lock()


class TextArenaGame:
    """An environment, as `grading.rollout.Environment`: a game of TextArena for one player.

    The reward is the game's own, in most games 1 where it is won, less for a part of it and -1 for a second move in a
    row that is not allowed. Metrics say whether it was won (a reward of 1 or more), and ended by such a move.

    Args:
        game: its name in TextArena.
        options: what its maker takes, as JSON.
    """

    def __init__(self, game: str, options: str = "{}") -> None:
        self._game = _textarena().make(game, **json.loads(options))
        self._drawn: Any = None

    def reset(self, row: Row) -> str:
        """As `Environment.reset`; the row's `seed` is the board's."""
        with self._drawing(row["seed"]):
            self._game.reset(num_players=1, seed=row["seed"])
        return self._observed()

    def step(self, completion: str) -> str | Mapping[str, Any]:
        """As `Environment.step`."""
        with self._drawing(None):
            done, _ = self._game.step(completion)
        if not done:
            return self._observed()
        rewards, info = self._game.close()
        reward = float((rewards or {}).get(0, 0.0))
        return {"reward": reward, WON: reward >= 1.0, "invalid_move": bool(info[0].get("invalid_move"))}

    def _observed(self) -> str:
        """What the game has said since it was last asked, without the player's own moves."""
        textarena = _textarena()
        game = self._game
        while isinstance(game, textarena.Wrapper):  # a wrapper for models repeats all that was said before
            game = game.env
        _, said = game.get_observation()
        own = textarena.ObservationType.PLAYER_ACTION
        return "\n".join(str(text) for _, text, kind in said if kind != own) or "It is your turn."

    @contextmanager
    def _drawing(self, seed: int | None) -> Iterator[None]:
        """Within this, Python's global generator, which games draw from, is as this game has left it."""
        with _DRAWING:
            before = random.getstate()
            if seed is not None:
                random.seed(seed)
            elif self._drawn is not None:
                random.setstate(self._drawn)
            try:
                yield
            finally:
                self._drawn = random.getstate()
                random.setstate(before)


class TextArenaConfig(TaskOptions):
    """Options of a game of TextArena."""

    summary: ClassVar[str] = "games of the library TextArena that one plays alone"
    usual_data: ClassVar[str] = "generated"

    name: str = Field(
        PREFIX, description="the task: textarena:GAME", pattern=r"^textarena:[\w-]+$", validate_default=False
    )
    train_size: int | None = Field(None, ge=1, le=SPAN, description="boards to train on; 200 if not given")
    eval_size: int | None = Field(None, ge=1, le=SPAN, description="held-out boards; 200 if not given")
    options: OwnOptions = Field(default_factory=dict, description="the game's own, as task.options.KEY=VALUE")
    chat: bool = Field(True, description="as a conversation, for the chat template; false: as plain text")
    seed: int | None = Field(None, ge=0, description="seed of the training boards; the run's seed if not given")

    def build(self, seed: int) -> Task:
        """Both sets, each row the seed of a board, played by `TextArenaGame`.

        Raises:
            EstuneError: TextArena is not installed, or has no such game, or the game is for several players, or cannot
                be played here.
        """
        game = self.name.removeprefix(PREFIX)
        make = functools.partial(TextArenaGame, game, json.dumps(self.options, sort_keys=True))
        self._check(game, make)
        own = seed if self.seed is None else self.seed
        return Task(
            name=self.name,
            train=self._rows(make, (1 + own % SEEDS) * SPAN, self.train_size or SIZE),
            evaluation=self._rows(make, 0, self.eval_size or SIZE),
            reward_funcs=[FromRollout(), FromRollout(WON, share=True)],
            reward_weights=[1.0, 0.0],
            accuracy=WON,
            rollout=Rollout("environment", make, chat=self.chat),
        )

    def _check(self, game: str, make: functools.partial[TextArenaGame]) -> None:
        known = list(_textarena().envs.registration.ENV_REGISTRY)
        if game not in known:
            near = difflib.get_close_matches(game, known, 1, 0.5)
            hint = f"did you mean textarena:{near[0]}?" if near else "see textarena.ai/environments"
            raise EstuneError(f"task {self.name}: TextArena has no such game; {hint}")
        try:
            played = make()
            played.reset({"seed": 0})
        except Exception as error:
            why = printable(" ".join(str(error).replace("*", "").split())[:200]) or type(error).__name__
            if "player" in why.lower():
                why = f"it is for several players ({why}); take one that is played alone"
            raise EstuneError(f"task {self.name}: it cannot be played here: {why}") from error
        if played._game.state.num_players != 1 or type(played._game.state).__name__ != "SinglePlayerState":
            raise EstuneError(f"task {self.name}: it is for several players; take one that is played alone")

    def _rows(self, make: functools.partial[TextArenaGame], first_seed: int, size: int) -> list[Row]:
        """Rows whose prompts contain the seed, which the model is not shown: many games begin with the same text."""
        seeds = range(first_seed, first_seed + size)
        return [{"prompt": f"{make().reset({'seed': seed})}\n[seed {seed}]", "seed": seed} for seed in seeds]


def _textarena() -> Any:
    try:
        import textarena
    except ImportError as error:
        raise EstuneError("games need the package textarena: pip install 'estune[textarena]'") from error
    return textarena
