"""Teach a model to answer briefly, as a script of TRL's users looks: `grpo.py` and `es.py` differ in two names.

python examples/FILE path/to/model path/to/output
"""

import sys

from datasets import Dataset

# isort: split
from estune import ESConfig, ESTrainer

COUNTRIES = ["France", "Italy", "Spain", "Japan", "Egypt", "Greece", "Norway", "Peru"]
prompts = Dataset.from_list([{"prompt": f"What is the capital of {country}?"} for country in COUNTRIES])


def short(completion_ids, **kwargs):
    """From 1 for nothing down to 0 for 16 tokens."""
    return [1 - len(ids) / 16 for ids in completion_ids]


trainer = ESTrainer(
    model=sys.argv[1],
    reward_funcs=short,
    args=ESConfig(
        output_dir=sys.argv[2],
        max_steps=3,
        max_completion_length=16,
        learning_rate=1e-6,
        num_generations=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=3,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=prompts.select(range(6)),
    eval_dataset=prompts.select(range(6, 8)),
)
trainer.train()
trainer.save_model()
for logs in trainer.state.log_history:
    if "reward" in logs:
        print(f"step {logs['step']}: reward {logs['reward']:.3f} ± {logs['reward_std']:.3f}")
    elif "eval_reward" in logs:
        print(f"step {logs['step']}: held-out reward {logs['eval_reward']:.3f}")
