"""Asks through litellm: whole, streamed, several at once, as text, and with a tool."""

import asyncio
import os

import litellm

NAME = os.environ["OPENAI_MODEL"]
MODEL = f"openai/{NAME}"
ASKED = [{"role": "user", "content": "What is the capital of France?"}]
CAPITAL = {
    "type": "function",
    "function": {
        "name": "capital",
        "description": "Gives the capital of a country.",
        "parameters": {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]},
    },
}


def text(answer):
    return answer.choices[0].message.content


print("whole:", text(litellm.completion(model=MODEL, messages=ASKED, max_tokens=20)))
pieces = litellm.completion(
    model=MODEL, messages=ASKED, max_tokens=20, stream=True, stream_options={"include_usage": True}
)
print("streamed:", "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))
several = asyncio.run(litellm.acompletion(model=MODEL, messages=ASKED, max_tokens=20, n=2, seed=1))
print("several:", len(several.choices), several.usage.completion_tokens > 0)
plain = litellm.text_completion(model=f"text-completion-openai/{NAME}", prompt="The capital", max_tokens=20)
print("text:", plain.choices[0].text)
called = litellm.completion(model=MODEL, messages=ASKED, tools=[CAPITAL], tool_choice="required").choices[0].message
print("call:", called.tool_calls[0].function.name, called.tool_calls[0].function.arguments)
result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "Paris"}
print("answer:", text(litellm.completion(model=MODEL, messages=[*ASKED, called, result], tools=[CAPITAL])))
