"""Sums that the real model is asked before and after it was trained for something else."""

from estune.rewards.conciseness import correct_reward

train = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(20, 50) for b in range(11, a + 1, 3)]
rewards = [correct_reward]
