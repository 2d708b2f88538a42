"""Tokens a second of concurrent requests over HTTP, against the same prompts in this process.

    python -m bench.speed.endpoint [--model tiny] [--requests 64] [--new-tokens 64]

- `in process`: all prompts are given to a `Batcher` at once.
- `over HTTP`: the same prompts, as conversations of one message, asked for at once over as many connections, which
  stay open. The client is another process, a plain one over sockets: what OpenAI's client costs is its own.

Greedy, so that both generate the same tokens, which is checked. They take turns; rates are of the median. As in
training, where all members are asked the same, the prompts' token ids are known from the second round on.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from bench.common import medians, options, rounded, settings, write_result
from bench.processes import Process

from estune.agents.endpoint import Endpoint
from estune.completion import Sampling
from estune.engines.continuous import Batcher, Request
from estune.engines.transformers import TransformersEngine


class Client:
    """Asks many requests at once; in a process of its own.

    Args:
        host, port, key: of the endpoint.
        bodies: of the requests.
    """

    def __init__(self, host: str, port: int, key: str, bodies: list[bytes]) -> None:
        self._loop = asyncio.new_event_loop()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
        self._requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._links = [self._loop.run_until_complete(asyncio.open_connection(host, port)) for _ in bodies]

    def ask(self) -> list[str]:
        """All answers' bodies."""
        return self._loop.run_until_complete(self._all())

    async def _all(self) -> list[str]:
        return list(await asyncio.gather(*map(self._one, self._links, self._requests)))

    async def _one(self, link: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> str:
        reader, writer = link
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length:")[2].split()[0])
        return (await reader.readexactly(length)).decode()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="at once")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    engine = TransformersEngine(arguments.model)
    sampling = Sampling(arguments.new_tokens)
    conversations: list[Any] = [
        [{"role": "user", "content": f"What is {n} plus {7 * n % 31}?"}] for n in range(arguments.requests)
    ]
    prompts = engine.encode(conversations)
    bodies = [json.dumps({"model": "m", "messages": messages}).encode() for messages in conversations]
    with Batcher(engine) as batcher, Endpoint(engine, sampling, model="m") as endpoint:
        endpoint.serve(batcher)
        key = endpoint.admit(0, lambda turn: None)
        host, _, port = endpoint.url.removeprefix("http://").removesuffix("/v1").partition(":")
        client = Process(Client, host, int(port), key, bodies)

        def in_process() -> list[Any]:
            return [future.result() for future in [batcher.submit(Request(ids, sampling)) for ids in prompts]]

        def over_http() -> list[str]:
            answers, _ = client.call(1, "ask")
            return [json.loads(answer)["choices"][0]["message"]["content"] for answer in answers]

        completions = in_process()
        assert over_http() == [completion.text for completion in completions]
        began = time.perf_counter()
        seconds = medians({"in process": in_process, "over HTTP": over_http}, arguments.repeats)
        client.close()
    tokens = sum(len(completion.token_ids) for completion in completions)
    result = {
        "settings": settings(arguments),
        "tokens": tokens,
        "seconds_in_all": rounded(time.perf_counter() - began),
        "tokens_per_second": rounded({name: tokens / value for name, value in seconds.items()}),
        "ratio": rounded(seconds["in process"] / seconds["over HTTP"]),
    }
    write_result(f"endpoint-{arguments.model}", result, arguments.results)


if __name__ == "__main__":
    main()
