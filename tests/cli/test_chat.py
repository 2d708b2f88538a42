"""Talking to a model in the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from estune.cli.chat import WIDE, converse
from estune.completion import Message, Sampling
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from estune.journal.share import pack
from estune.run.chat import Chat, open_chats
from estune.run.trainer import Trainer
from tests.command_line import estune, refused
from tests.models import build_tokenizer, save_model
from tests.runs import make_config, make_task

NEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(make_config(folder, model, steps=1, eval_on_start=False), task=make_task()).train()
    return folder


def expected(model: Path, messages: list[Message] | str, new: int = 6) -> str:
    engine = TransformersEngine(model)
    return engine.generate(engine.encode([messages]), Sampling(new))[0].text


def reader(*said: str | type[BaseException]) -> Callable[[str], str]:
    """Gives one message after the other, then the end of the input."""
    left: Iterator[str | type[BaseException]] = iter([*said, EOFError])

    def read(prompt: str) -> str:
        found = next(left)
        if isinstance(found, str):
            return found
        raise found

    return read


def shown(chats: dict[str, Chat], *said: str | type[BaseException], width: int = 80, terminal: bool = False) -> str:
    file = io.StringIO()
    converse(chats, reader(*said), Console(file=file, width=width, force_terminal=terminal, color_system=None))
    return file.getvalue()


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def test_a_conversation_is_kept_until_it_is_cleared(model: Path) -> None:
    chats = open_chats(str(model), NEW, "Be brief.")
    (chat,) = chats.values()
    begin = [say("system", "Be brief."), say("user", "2 + 2")]
    first = expected(model, begin)
    then = [*begin, say("assistant", first), say("user", "and 3")]
    told: list[str] = []
    assert chat.answer("2 + 2", told.append).text == first
    assert told[-1] in first
    assert chat.answer("and 3", told.append).text == expected(model, then)
    chat.clear()
    assert chat.answer("2 + 2", told.append).text == first


def test_an_answer_that_ctrl_c_ended_is_kept_as_far_as_it_came(model: Path) -> None:
    (chat,) = open_chats(str(model), NEW).values()
    heard: list[str] = []

    def interrupt(text: str) -> None:
        heard.append(text)
        if len(text) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.answer("2 + 2", interrupt)
    messages = [say("user", "2 + 2"), say("assistant", heard[-1]), say("user", "and 3")]
    assert chat.answer("and 3", heard.append).text == expected(model, messages)


def test_a_model_without_template_goes_on_with_each_text(tmp_path: Path) -> None:
    plain = save_model(tmp_path, tokenizer=build_tokenizer(chat=False))
    (chat,) = open_chats(str(plain), NEW).values()
    for text in ("2 + 2 =", "9 9"):
        assert chat.answer(text, lambda text: None).text == expected(plain, text)
    with pytest.raises(EstuneError, match="no chat template"):
        open_chats(str(plain), NEW, "Be brief.")


def test_the_terminal_shows_answers_and_nothing_that_moves_its_cursor(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    chats = open_chats(str(model), NEW)
    out = shown(chats, "2 + 2", KeyboardInterrupt, "  ", "/clear", "2 + 2", "/exit", "2 + 2")
    answer = expected(model, [say("user", "2 + 2")])
    assert not answer.isprintable()  # or this test shows nothing
    assert out.count("".join(c if c.isprintable() else "?" for c in answer)) == 2
    assert all(line.isprintable() for line in out.split("\n"))


def test_a_conversation_beyond_the_context_is_one_line(model: Path) -> None:
    chats = open_chats(str(model), {"max_new_tokens": 1000})
    assert "300 tokens, and the model reaches 256: begin anew with /clear" in shown(chats, "x" * 297)
    (chat,) = chats.values()
    assert len(chat.answer("x" * 247, lambda text: None).token_ids) <= 6  # what room there is


@pytest.mark.parametrize("width", [WIDE, WIDE - 1])
def test_the_base_model_answers_beside_the_tuned_one(run: Path, model: Path, width: int) -> None:
    chats = open_chats(str(run), {}, compare=True)
    out = shown(chats, "hello", width=width, terminal=True)
    for name, place in (("tuned", run / "best"), ("base", model)):
        text = expected(place, [say("user", "hello")], 8)
        assert "".join(c if c.isprintable() else "?" for c in text) in out
        assert name in out
    beside = any("tuned" in line and "base" in line for line in out.splitlines())
    assert beside == (width == WIDE)


def test_a_run_in_a_file_has_its_weights_rebuilt(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.estune"
    pack(run, file)
    (chat,) = open_chats(str(file), {}).values()
    assert chat.answer("hello", lambda text: None).text == expected(run / "final", [say("user", "hello")], 8)
    assert list(tmp_path.iterdir()) == [file]


def test_a_text_on_standard_input_is_answered_once(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert estune("chat", model, "--max-new-tokens", 6) == 0
    answer = expected(model, [say("user", "two\nlines")])
    assert capsys.readouterr().out.rstrip("\n") == "".join(c if c.isprintable() else "?" for c in answer)
    assert "no text to answer" in refused(capsys, "chat", model)
    assert "no run's directory" in refused(capsys, "chat", model, "--compare")
