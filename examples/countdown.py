"""Teach a model Countdown from Python: what `estune train` does, and what comes back.

python examples/countdown.py [SETTING=VALUE ...]
"""

import sys

from estune import Trainer
from estune.config import load

config = load(overrides=sys.argv[1:])
summary = Trainer(config).train()
print(f"held-out accuracy {summary.before['eval_accuracy']:.1%} -> {summary.after['eval_accuracy']:.1%}")
print(f"best checkpoint, after step {summary.best['step']}: {summary.run / 'best'}")
