"""vLLM alone, for `bench.speed.real_model`: `LLM.generate` as its documentation has it, in an environment of its own.

Takes a model and a type on the command line, then on each line of standard input prompts and the most tokens of a
completion, as JSON; answers each with the seconds and tokens that it took, on a line that begins with `ANSWER`.
"""

from __future__ import annotations

import json
import sys
import time

ANSWER = "ANSWER "


def main() -> None:
    """Serve until standard input ends."""
    from vllm import LLM, SamplingParams, TokensPrompt

    model, dtype = sys.argv[1:]
    llm = LLM(model=model, dtype=dtype, max_model_len=512, enforce_eager=True)
    print(ANSWER + "{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"])
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
        start = time.perf_counter()
        made = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(one.outputs[0].token_ids) for one in made)
        print(ANSWER + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
