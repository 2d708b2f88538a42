"""Other people's clients, unmodified, in processes of their own, against an endpoint whose model follows a script.

Each is looked for in the running environment, and then in one of its own, which `make clients` installs.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from estune.agents.endpoint import Endpoint
from tests.agents.conftest import Scripted, mark, python_with

SCRIPTS = Path(__file__).parent / "clients"
SECONDS = 120
CALL = '<tool_call>\n{"name": "capital", "arguments": {"country": "France"}}\n</tool_call>'


def client(endpoint: Endpoint, arguments: Sequence[str | Path], **environment: str) -> str:
    """What a client has printed.

    Args:
        endpoint: that it asks.
        arguments: its command.
        environment: its variables beside the endpoint's.
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    asked = {
        "OPENAI_BASE_URL": endpoint.url,
        "OPENAI_API_KEY": endpoint.admit(0, lambda turn: None),
        "OPENAI_MODEL": endpoint.model,
    }
    done = subprocess.run(
        list(map(str, arguments)),
        env={**os.environ, **offline, **asked, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_litellm(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    engine.script = ["It is Paris."] * 5 + ['capital", "arguments": {"country": "France"}}</tool_call>']
    engine.text = "Paris, as I was told."
    said = client(endpoint, [python_with("litellm"), SCRIPTS / "ask_litellm.py"])
    assert said.splitlines() == [
        "whole: It is Paris.",
        "streamed: It is Paris.",
        "several: 2 True",
        "text: It is Paris.",
        'call: capital {"country": "France"}',
        "answer: Paris, as I was told.",
    ]


def test_smolagents(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    engine.script = [
        'capital", "arguments": {"country": "France"}}</tool_call>',  # it requires a call, which is begun
        'final_answer", "arguments": {"answer": "Paris, by a call"}}</tool_call>',
        'I look it up.\n<code>\nfinal_answer(capital("France") + ", by code")\n',  # it stops at </code>
    ]
    said = client(endpoint, [python_with("smolagents"), SCRIPTS / "ask_smolagents.py"])
    assert said.splitlines() == ["ToolCallingAgent: Paris, by a call", "CodeAgent: Paris, by code"]


def test_openais_agents(scripted: tuple[Scripted, Endpoint]) -> None:
    engine, endpoint = scripted
    mark(engine, "<tool_call>")
    engine.script = [CALL, "It is Paris.", CALL, "Paris it is."]
    said = client(endpoint, [python_with("agents"), SCRIPTS / "ask_agents.py"])
    assert said.splitlines() == ["whole: It is Paris.", "streamed: Paris it is."]


def test_lm_eval(scripted: tuple[Scripted, Endpoint], tmp_path: Path) -> None:
    engine, endpoint = scripted
    engine.text = "Paris"
    rows = [{"question": f"Name the capital of {c}.", "answer": a} for c, a in (("France", "Paris"), ("Italy", "Rome"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "capitals.yaml").write_text(
        f"""
        task: capitals
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: "{tmp_path}/rows.jsonl"}}}}
        test_split: test
        output_type: generate_until
        doc_to_text: "{{{{question}}}}"
        doc_to_target: "{{{{answer}}}}"
        generation_kwargs: {{until: ["\\n"], max_gen_toks: 20, temperature: 0, do_sample: false}}
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
        """
    )
    url = f"{endpoint.url}/chat/completions"
    arguments = ["--model", "local-chat-completions", "--model_args", f"model=scripted,base_url={url},num_concurrent=2"]
    arguments += ["--tasks", "capitals", "--include_path", str(tmp_path), "--apply_chat_template"]
    arguments += ["--output_path", f"{tmp_path}/out.json"]
    client(endpoint, [python_with("lm_eval"), "-m", "lm_eval", *arguments], HF_HOME=f"{tmp_path}/cache")
    (file,) = tmp_path.glob("out*.json")
    assert json.loads(file.read_text())["results"]["capitals"]["exact_match,none"] == 0.5


def test_vf_eval(scripted: tuple[Scripted, Endpoint], tmp_path: Path) -> None:
    engine, endpoint = scripted
    engine.text = "Paris"
    python = python_with("verifiers")
    command = [Path(python).with_name("vf-eval"), "estune-capitals", "--model", "scripted", "--output-dir", tmp_path]
    command += ["--client.base-url", endpoint.url, "--client.api-key-var", "OPENAI_API_KEY", "--no-push", "--no-rich"]
    command += ["--env.agent.harness.id", "null", "--env.agent.runtime.type", "subprocess"]
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])  # its harness is started by uv
    client(endpoint, command, PYTHONPATH=str(SCRIPTS), PATH=path)
    (file,) = tmp_path.rglob("traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text().splitlines()]
    rewards = {e["task"]["data"]["name"]: e["traces"][0]["rewards"]["right"]["score"] for e in episodes}
    assert rewards == {"France": 1.0, "Italy": 0.0, "Japan": 0.0, "Spain": 0.0}
