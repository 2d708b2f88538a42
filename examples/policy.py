"""Evolution Strategies over any PyTorch module: a small policy learns to balance a pole (gymnasium's CartPole-v1).

pip install gymnasium && python examples/policy.py
"""

import gymnasium
import torch

from estune import EvolutionStrategy, Weights

STEPS = 12
EPISODES = 2  # each with a start of its own, the same for all members of a step

torch.manual_seed(0)
policy = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
weights = Weights.of(policy)
strategy = EvolutionStrategy(population=16, sigma=0.1, learning_rate=0.2, steps=STEPS, mirrored=True)
world = gymnasium.make("CartPole-v1")


@torch.inference_mode()
def play(start):
    """How many moves the pole stays up, at most 500."""
    seen, _ = world.reset(seed=start)
    total = 0
    while True:
        seen, reward, fallen, over, _ = world.step(int(policy(torch.from_numpy(seen)).argmax()))
        total += reward
        if fallen or over:
            return total


def mean(starts):
    """Of the weights as they are now."""
    found = [play(start) for start in starts]
    return sum(found) / len(found)


before = mean(range(1000, 1020))
for step in range(STEPS):
    starts = range(step * EPISODES, (step + 1) * EPISODES)
    rewards = []
    for member in strategy.ask():
        weights.perturb(member, strategy.sigma)
        rewards.append(mean(starts))
    weights.apply(strategy.tell(rewards))
    weights.restore()
print(f"moves on 20 starts it has not seen: {before:.0f} -> {mean(range(1000, 1020)):.0f}")
