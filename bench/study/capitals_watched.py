"""Capitals as a task that is only to be kept: its questions and rewards, which count nothing."""

from examples import capitals

train, evaluation, rewards = capitals.train, capitals.evaluation, capitals.rewards
weights = [0.0] * len(rewards)
