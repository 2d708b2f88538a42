"""An agent that is a program: it finds the model in its environment, a row on standard input, and prints its reward.

estune train --task custom --task.data examples/facts.jsonl --task.accuracy right \\
    --task.program "python examples/agent.py"

It asks, and asks once more where the answer is wrong, for half of the reward; long answers cost a little. With the
standard library alone it starts in a moment. With OpenAI's client, or a framework for agents, `OPENAI_BASE_URL` and
`OPENAI_API_KEY` are found by it.
"""

import json
import os
import urllib.request


def ask(messages: list[dict[str, str]]) -> str:
    """The model's answer."""
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": os.environ["OPENAI_MODEL"], "messages": messages}).encode(),
        {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


row = json.loads(input())
messages = [{"role": "user", "content": row["prompt"]}]
right = False
tries = 0
written = 0
while not right and tries < 2:
    said = ask(messages)
    tries += 1
    written += len(said)
    right = row["answer"].lower() in said.lower()
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": row["prompt"]}]
print(json.dumps({"reward": right / tries - written / 200, "right": right}))
