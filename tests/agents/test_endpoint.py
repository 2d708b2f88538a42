"""An endpoint as OpenAI's clients, and ruder ones, meet it: over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from estune.agents.answering import MOST_BYTES
from estune.agents.clients import Turn
from estune.agents.endpoint import Endpoint
from estune.completion import Sampling
from estune.engines.continuous import Batcher
from estune.engines.transformers import TransformersEngine
from estune.errors import EstuneError
from tests.agents.conftest import Scripted, mark

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
NEW = Sampling(8)
SECONDS = 30


@pytest.fixture(scope="module")
def endpoint(engine: TransformersEngine) -> Iterator[Endpoint]:
    with Endpoint(engine, NEW, model="small") as endpoint, Batcher(engine) as batcher:
        endpoint.serve(batcher)
        yield endpoint


def client_of(endpoint: Endpoint, seed: int = 0, told: Callable[[Turn], None] = lambda turn: None) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.url, api_key=endpoint.admit(seed, told), max_retries=0)


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with client_of(endpoint) as client:
        yield client


def generated(engine: TransformersEngine, prompt: Any, sampling: Sampling = NEW) -> str:
    return engine.generate(engine.encode([prompt]), sampling)[0].text


def test_a_conversation_is_answered_and_told(engine: TransformersEngine, endpoint: Endpoint) -> None:
    turns: list[Turn] = []
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    with client_of(endpoint, told=turns.append) as client:
        found = client.chat.completions.create(model="small", messages=messages)
    shown = [{"role": "system", "content": "Be brief."}, *HELLO]
    (choice,) = found.choices
    assert choice.message.content == generated(engine, shown)
    assert choice.finish_reason == "length"
    (ids,) = engine.encode([shown])
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 8)
    (turn,) = turns
    assert (turn.messages, turn.tools, turn.prompt_ids) == (messages, (), ids)
    assert turn.answer == {"role": "assistant", "content": choice.message.content}
    assert turn.completions == tuple(engine.generate([ids], NEW))


def test_a_stream_is_the_same_in_pieces(engine: TransformersEngine, client: openai.OpenAI) -> None:
    pieces = list(
        client.chat.completions.create(
            model="small", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    for index in range(2):
        choices = [choice for piece in pieces for choice in piece.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == generated(engine, HELLO)
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
        assert choices[0].delta.role == "assistant"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 16


def test_texts_and_token_ids_are_gone_on_with(engine: TransformersEngine, client: openai.OpenAI) -> None:
    found = client.completions.create(model="small", prompt=["one", "two"], max_tokens=5)
    assert [choice.text for choice in found.choices] == [generated(engine, p, Sampling(5)) for p in ("one", "two")]
    ids = engine.encode(["two"])[0]
    assert client.completions.create(model="small", prompt=ids, max_tokens=5).choices[0].text == found.choices[1].text
    pieces = client.completions.create(model="small", prompt="one", max_tokens=5, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text
    whole = generated(engine, "one")
    stop = whole[3:5]
    stopped = client.completions.create(model="small", prompt="one", stop=["never", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_whoever_shares_the_batch_an_answer_is_the_same(engine: TransformersEngine, endpoint: Endpoint) -> None:
    asked = [[{"role": "user", "content": f"Say {n}"}] for n in range(12)]

    async def all_at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.admit(0, lambda turn: None)) as client:

            async def ask(messages: Any) -> str | None:
                found = await client.chat.completions.create(model="small", messages=messages)
                return found.choices[0].message.content

            return await asyncio.gather(*map(ask, asked))

    assert asyncio.run(all_at_once()) == [generated(engine, messages) for messages in asked]


def test_draws_follow_the_seed_and_what_has_been_asked(endpoint: Endpoint) -> None:
    def answers(own: int, questions: list[str], **options: Any) -> list[str]:
        with client_of(endpoint, own) as client:
            found = [
                client.completions.create(model="small", prompt=question, temperature=1.5, **options)
                for question in questions
            ]
        return [choice.text for each in found for choice in each.choices]

    first = answers(7, ["a", "b", "a"])
    assert first[0] != first[2]
    assert answers(7, ["b", "a", "a"]) == [first[1], first[0], first[2]]  # in whatever order they come
    assert answers(8, ["a"]) != first[:1]
    four = answers(7, ["a"], n=4)
    assert len(set(four)) == 4
    assert four[0] == first[0]
    assert answers(1, ["a", "a"], seed=3) == answers(2, ["a", "a"], seed=3)


REFUSED: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"messages": []}, 400, None, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, None, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "context_length_exceeded", "messages"),
    ({"max_tokens": 250}, 400, "context_length_exceeded", "messages"),
    ({"temperature": 2.5}, 400, None, "temperature"),
    ({"top_p": 0}, 400, None, "top_p"),
    ({"n": 0}, 400, None, "n"),
    ({"stop": list("abcde")}, 400, None, "stop"),
    ({"logprobs": True}, 400, "unsupported_parameter", "logprobs"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ({"frequency_penalty": 0.5}, 400, "unsupported_parameter", "frequency_penalty"),
    ({"tools": [{"type": "function"}]}, 400, None, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, None, None),  # its template takes none
    ({"tool_choice": "required"}, 400, None, "tool_choice"),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), REFUSED)
def test_what_cannot_be_kept_is_refused(
    client: openai.OpenAI, change: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "small", "messages": HELLO, **change})
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)


def test_neutral_values_of_what_cannot_be_kept_are_none(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="small", messages=HELLO, logprobs=False, response_format={"type": "text"}, presence_penalty=0,
        tool_choice="none", tools=[{"type": "function", "function": {"name": "f"}}], user="me", logit_bias={},
    )  # fmt: skip


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_is_no_request_of_openai_s(endpoint: Endpoint) -> None:
    headers = {"authorization": f"Bearer {endpoint.admit(0, lambda turn: None)}"}
    with httpx.Client(base_url=endpoint.url, headers=headers) as client:
        for answer, status in (
            (client.post("/chat/completions", content=b"{"), 400),
            (client.post("/chat/completions", content=b"[]"), 400),
            (client.post("/chat/completions", content=b"[" * 100_000), 400),
            (client.post("/completions", content=b" " * (MOST_BYTES + 1)), 413),
            (client.post("/embeddings", json={}), 404),
            (client.get("/completions"), 405),
        ):
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["message"]


def test_a_key_is_good_until_it_is_revoked_or_others_are_served(
    engine: TransformersEngine, scripted: tuple[Scripted, Endpoint]
) -> None:
    _, endpoint = scripted
    with httpx.Client(base_url=endpoint.url) as bare:
        assert bare.get("/models").status_code == 401
        assert (
            bare.get("/models", headers={"authorization": "Bearer wrong"}).json()["error"]["code"] == "invalid_api_key"
        )
    with client_of(endpoint) as one, client_of(endpoint) as other:
        endpoint.revoke(one.api_key)
        with pytest.raises(openai.AuthenticationError):
            one.models.list()
        other.models.list()
        endpoint.serve(None)
        with pytest.raises(openai.AuthenticationError):
            other.models.list()
    with pytest.raises(EstuneError, match="no weights are served"):
        endpoint.admit(0, lambda turn: None)


@pytest.mark.parametrize("how", ["revoked", "others are served"])
def test_revoked_in_the_middle_a_request_is_refused_and_told_to_nobody(
    how: str, scripted: tuple[Scripted, Endpoint]
) -> None:
    engine, endpoint = scripted
    engine.held = True
    turns: list[Turn] = []
    with client_of(endpoint, told=turns.append) as client, ThreadPoolExecutor() as pool:
        asked = pool.submit(client.chat.completions.create, model="scripted", messages=HELLO)
        assert engine.joined.wait(SECONDS)
        if how == "revoked":
            endpoint.revoke(client.api_key)
        else:
            endpoint.serve(None)
        with pytest.raises(openai.AuthenticationError):
            asked.result(SECONDS)
    assert engine.left.wait(SECONDS)
    assert turns == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_makes_room(scripted: tuple[Scripted, Endpoint], stream: bool) -> None:
    engine, endpoint = scripted
    engine.held = True
    body = json.dumps({"model": "scripted", "messages": HELLO, "stream": stream}).encode()
    key = endpoint.admit(0, lambda turn: None)
    url = httpx.URL(endpoint.url)
    with socket.create_connection((url.host, url.port or 0)) as link:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        link.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        assert engine.joined.wait(SECONDS)
        assert not engine.left.is_set()
    assert engine.left.wait(SECONDS)


def test_a_flood_is_told_to_wait(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    engine.held = True
    engine.text = "done"
    headers = {"authorization": f"Bearer {endpoint.admit(0, lambda turn: None)}"}

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=endpoint.url, headers=headers, limits=limits, timeout=SECONDS) as client:
            asked = [client.post("/completions", json={"model": "scripted", "prompt": "x"}) for _ in range(100)]
            tasks = [asyncio.ensure_future(each) for each in asked]
            while sum(task.done() for task in tasks) < 96:
                await asyncio.sleep(0.01)
            engine.held = False
            return await asyncio.gather(*tasks)

    answers = asyncio.run(flood())
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 96
    assert {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200} == {"done"}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_an_engine_that_fails_is_a_server_s_error(
    scripted: tuple[Scripted, Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, endpoint = scripted

    def step() -> Any:
        raise RuntimeError("burnt out")

    monkeypatch.setattr(engine, "step", step)
    with client_of(endpoint) as client:
        with pytest.raises(openai.InternalServerError, match="burnt out") as caught:
            client.chat.completions.create(model="scripted", messages=HELLO)
        assert caught.value.status_code == 500
        with pytest.raises(openai.InternalServerError, match="burnt out"):
            client.chat.completions.create(model="scripted", messages=HELLO)


def test_a_port_that_is_taken(endpoint: Endpoint, engine: TransformersEngine) -> None:
    port = httpx.URL(endpoint.url).port
    assert port is not None
    with pytest.raises(EstuneError, match=f"cannot listen at 127.0.0.1, port {port} .*take another port"):
        Endpoint(engine, NEW, model="small", port=port)


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
        },
    }
]
ADD = {"a": 1, "b": "2"}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "2"}}\n</tool_call>'
WRITTEN = {  # marks of a chat template, an answer, and the content that is left of it
    "hermes": ("<tool_call>", f"Sure.\n{HERMES}", "Sure."),
    "hermes, thinking": ("<tool_call>", f"<think>{HERMES}?</think>{HERMES}", f"<think>{HERMES}?</think>"),
    "hermes, a list": (
        "<tool_call>",
        '<tool_call>[{"name": "add", "arguments": {"a": 1, "b": "2"}}]</tool_call>',
        None,
    ),
    "xml": (
        "<tool_call><function=<parameter=",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n"
        "</tool_call>",
        None,
    ),
    "llama": ("<|start_header_id|>parameters", '{"name": "add", "parameters": {"a": 1, "b": "2"}}', None),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": "2"}}]', None),
    "phi": ("<|tool_call|>", '<|tool_call|>[{"name": "add", "arguments": {"a": 1, "b": "2"}}]<|/tool_call|>', None),
    "json": ('"name""arguments"', '{"name": "add", "arguments": {"a": 1, "b": "2"}}', None),
}


@pytest.mark.parametrize("style", WRITTEN)
def test_a_tool_call_comes_back_and_goes_round(scripted: tuple[Scripted, Endpoint], style: str) -> None:
    engine, endpoint = scripted
    marks, engine.text, content = WRITTEN[style]
    mark(engine, marks)
    turns: list[Turn] = []
    with client_of(endpoint, told=turns.append) as client:
        found = client.chat.completions.create(model="scripted", messages=HELLO, tools=TOOLS)
        assert '"description": "Adds"' in engine.shown()
        message = found.choices[0].message
        assert found.choices[0].finish_reason == "tool_calls"
        assert message.content == content
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.type == "function"
        assert call.function.name == "add"
        assert json.loads(call.function.arguments) == ADD
        assert turns[0].answer["tool_calls"] == [call.model_dump()]
        assert turns[0].tools == tuple(TOOLS)
        (streamed,) = (
            delta.tool_calls
            for piece in client.chat.completions.create(model="scripted", messages=HELLO, tools=TOOLS, stream=True)
            if (delta := piece.choices[0].delta).tool_calls
        )
        assert streamed[0].function is not None
        assert json.loads(streamed[0].function.arguments or "") == ADD
        answer: Any = message.model_dump(exclude_none=True)
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "3"}
        client.chat.completions.create(model="scripted", messages=[*HELLO, answer, result], tools=TOOLS)
        assert f"{content or ''}1!<|end|><|tool|>3<|end|>" in engine.shown()


def test_an_answer_without_a_call_that_can_be_read_is_text(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    with client_of(endpoint) as client:
        for engine.text in (
            "Just so.",
            '<tool_call>{"name": "add", "arg',
            "<tool_call>[1]</tool_call>",
            f"<think>{HERMES}",
        ):
            found = client.chat.completions.create(model="scripted", messages=HELLO, tools=TOOLS).choices[0]
            assert (found.message.content, found.message.tool_calls, found.finish_reason) == (engine.text, None, "stop")


def test_a_call_that_is_required_is_begun(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    with client_of(endpoint) as client:
        for choice, rest in (
            ("required", 'add", "arguments": {"a": 1, "b": "2"}}</tool_call>'),
            ({"type": "function", "function": {"name": "add"}}, '{"a": 1, "b": "2"}}</tool_call>'),
        ):
            engine.text = rest
            asked: Any = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice}
            (call,) = client.chat.completions.create(model="scripted", **asked).choices[0].message.tool_calls or ()
            assert engine.shown().endswith(HERMES.replace("\n</tool_call>", "</tool_call>").removesuffix(rest))
            assert call.type == "function"
            assert json.loads(call.function.arguments) == ADD


def test_a_template_whose_calls_are_unknown_is_refused(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<<call>>")
    with client_of(endpoint) as client, pytest.raises(openai.BadRequestError, match="in a way that is not known"):
        client.chat.completions.create(model="scripted", messages=HELLO, tools=TOOLS)
