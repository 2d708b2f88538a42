"""Environments of verifiers, played for estune by a Python that has verifiers and need not have estune.

What is asked and answered is JSON, a line each, on standard input and output. First comes the environment,
`{"taskset": ID, "options": {...}}`, then any number of

- `{"list": N}`: its tasks, N of them if they are endless; answered by `{"task": {...}, "prompt": ..., "name": ...}` for
  each and then `{"listed": number, "endless": ...}`;
- `{"play": number, "task": {...}, "url": ..., "key": ..., "model": ...}`: answered, when it has ended, by
  `{"played": number}` with `reward` and `metrics`, or with `failure` and `why`;
- `{"drop": number}`: it is not waited for any more.

`{"error": ...}` says why nothing can be played at all. The process ends where its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
import types
from itertools import islice
from typing import Any

RENEW = 1000  # rollouts, after which what verifiers keeps of each, a client, is closed
GRACE = 10.0  # seconds for rollouts to end in, where the input has ended

ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what an environment prints is no answer


def say(answer: dict[str, Any]) -> None:
    """Write an answer."""
    ANSWERS.write(json.dumps(answer) + "\n")
    ANSWERS.flush()


def shown(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


try:
    import httpx
    import verifiers.v1 as vf
    from verifiers.v1.dialects.chat import message_to_wire
    from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
except ImportError as missing:
    say({"error": f"cannot import {missing.name} ({missing}): it needs verifiers 0.4; name its Python in task.python"})
    sys.exit(1)


class Chat(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
    """As verifiers' harness `null`, a conversation with tools, but within this process: that one starts one a turn."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        """As `Harness.launch`."""
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message_to_wire(message) for message in prompt or []]
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(
                httpx.AsyncClient(headers={"authorization": f"Bearer {secret}"}, timeout=None)
            )
            tools: list[dict[str, Any]] = []
            dispatch: dict[str, Any] = {}
            servers: dict[str, Any] = {}
            if mcp_urls:
                specs = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
                tools, dispatch, servers = await connect_mcp({"mcpServers": specs}, stack, set())
            while True:
                body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                response = await http.post(f"{endpoint.rstrip('/')}/chat/completions", json=body)
                if response.is_error:
                    return vf.ProgramResult(exit_code=1, stdout="", stderr=response.text)
                message = response.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    content = await _called(call["function"], dispatch, servers)
                    messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


async def _called(function: dict[str, Any], dispatch: dict[str, Any], servers: dict[str, Any]) -> Any:
    """What a tool gives, or what is wrong with the call."""
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError as error:
        return f"error: the arguments are no JSON ({error})"
    if not isinstance(arguments, dict):
        return "error: the arguments are no JSON object"
    if function["name"] not in dispatch:
        return f"error: there is no tool {function['name']!r}"
    return await call_mcp(servers, dispatch, function["name"], arguments)


CHAT = types.ModuleType("estune_chat")
CHAT.__dict__.update(Chat=Chat, __all__=["Chat"])
sys.modules[CHAT.__name__] = CHAT  # where verifiers looks for a harness of this name


def environment(taskset: str, options: dict[str, Any]) -> vf.Env:
    """An environment, as `vf-eval` makes it of `--env.*`.

    Where neither it nor the options say otherwise its agents have no shell, and run on this machine; verifiers' own
    default is a shell in a sandbox of Prime's.
    """
    config: dict[str, Any] = {**options, "taskset": {**(options.get("taskset") or {}), "id": taskset}}
    kind = vf.env_config_type(taskset, config.get("id") or "")
    bundled = vf.default_harness_id(taskset)
    for name, field in kind.model_fields.items():
        if isinstance(field.default, vf.AgentConfig):
            seat = config[name] = dict(config.get(name) or {})
            if field.default.harness is None and bundled == "bash":
                seat.setdefault("harness", {"id": CHAT.__name__})
            if "runtime" not in field.default.model_fields_set:
                seat.setdefault("runtime", {"type": "subprocess"})
    return vf.load_environment(kind.model_validate(config))


def outcome(episode: vf.Episode) -> dict[str, Any]:
    """What a rollout came to: the means of its agents that learn."""
    traces = [trace for trace in episode.traces if trace.agent.trainable]
    if not episode.ok or not traces:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        why = f"{errors[-1].type}: {errors[-1].message}" if errors else "ended without a trace"
        late = episode.is_timeout or any(trace.is_timeout for trace in episode.traces)
        long = any("context_length_exceeded" in error.message for error in errors)
        return {"failure": "timeouts" if late else "too_long" if long else "errors", "why": why}
    found: dict[str, list[float]] = {}
    for trace in traces:
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        for name, value in {**scores, **trace.metrics}.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    metrics = {name: sum(values) / len(values) for name, values in found.items()}
    return {"reward": sum(trace.reward for trace in traces) / len(traces), "metrics": metrics}


async def play(env: vf.Env, asked: dict[str, Any]) -> dict[str, Any]:
    """Play a task with a member."""
    variable = f"ESTUNE_API_KEY_{asked['play']}"  # verifiers takes a key from the environment, and from nowhere else
    os.environ[variable] = asked["key"]
    try:
        client = vf.EvalClientConfig(
            base_url=asked["url"], api_key_var=variable, headers={"connection": "close"}
        )  # its own client would keep a connection open for each rollout
        kind = type(env.taskset).task_type()
        task = kind(kind.data_type().model_validate(asked["task"]), env.config.taskset.task)
        (slot,) = env.slots(task)
        return outcome(await env.run_slot(slot, vf.ModelContext(model=asked["model"], client=client)))
    except Exception as error:
        return {"failure": "errors", "why": shown(error)}
    finally:
        os.environ.pop(variable, None)


def tell_tasks(env: vf.Env, most: int) -> None:
    """Answer with the tasks."""
    endless = not env.taskset.bounded
    number = 0
    for task in islice(env.taskset, most if endless else None):
        data = task.data.model_dump(mode="json")
        say({"task": data, "prompt": task.data.prompt_text, "name": task.data.name or str(task.data.idx)})
        number += 1
    say({"listed": number, "endless": endless})


def _listen(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        loop.call_soon_threadsafe(heard.put_nowait, json.loads(line))
    loop.call_soon_threadsafe(heard.put_nowait, None)
    time.sleep(GRACE)
    os._exit(1)  # an environment that computes lets nothing else run


async def main(env: vf.Env) -> None:
    """Answer until the input ends."""
    heard: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    threading.Thread(target=_listen, args=(asyncio.get_running_loop(), heard), daemon=True).start()
    running: dict[int, asyncio.Task[None]] = {}

    async def answer(asked: dict[str, Any]) -> None:
        try:
            say({"played": asked["play"], **await play(env, asked)})
        finally:
            del running[asked["play"]]

    async with contextlib.AsyncExitStack() as serving:
        played = RENEW
        while (asked := await heard.get()) is not None:
            if "list" in asked:
                tell_tasks(env, asked["list"])
            elif "drop" in asked:
                if asked["drop"] in running:
                    running[asked["drop"]].cancel()
            else:
                if not running and played >= RENEW:
                    await serving.aclose()
                    await serving.enter_async_context(env.serving())
                    played = 0
                played += 1
                running[asked["play"]] = asyncio.create_task(answer(asked))
        left = list(running.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(environment(**json.loads(sys.stdin.readline()))))
    except Exception as error:
        say({"error": shown(error)})
        sys.exit(1)
