"""The same function made small by cmaes, by evosax and by estune.es, each loop as its library's own README writes it.

pip install cmaes evosax && python examples/ask_and_tell.py

One that is not installed is left out. For two numbers, CMA-ES is the best of the three by far. It learns a covariance,
which for a language model's weights would fit into no memory; nor do members fit there as arrays, hence seeds.
"""

import numpy as np

from estune import normal
from estune.es import EvolutionStrategy, Schedule

POPULATION = 16
STEPS = 60
START = np.zeros(2)


def quadratic(x1, x2):
    """The function of cmaes' README: 0 at 3, -2."""
    return (x1 - 3) ** 2 + (10 * (x2 + 2)) ** 2


def by_cmaes():
    """Points are asked for one by one, and told with their values."""
    from cmaes import CMA

    optimizer = CMA(mean=START, sigma=1.3, population_size=POPULATION, seed=0)
    for _ in range(STEPS):
        solutions = []
        for _ in range(optimizer.population_size):
            x = optimizer.ask()
            solutions.append((x, quadratic(*x)))
        optimizer.tell(solutions)
    return optimizer.mean


def by_evosax():
    """All points are asked for as an array; state and random keys go through every call."""
    import jax
    import optax
    from evosax.algorithms import Open_ES

    steady = optax.constant_schedule(0.3)
    es = Open_ES(POPULATION, solution=START, optimizer=optax.adam(0.2), std_schedule=steady)
    params = es.default_params
    key = jax.random.key(0)
    state = es.init(key, START, params)
    for _ in range(STEPS):
        key, asking, telling = jax.random.split(key, 3)
        population, state = es.ask(asking, state, params)
        fitness = quadratic(population[:, 0], population[:, 1])
        state, _ = es.tell(telling, population, fitness, state, params)
    return np.asarray(es.get_mean(state))


def by_estune():
    """Members are seeds, whose noise is drawn where it is needed, and so is the update."""
    falling = Schedule("linear", end=0.01)
    strategy = EvolutionStrategy(
        population=POPULATION,
        sigma=1.3,
        sigma_schedule=falling,
        learning_rate="1sigma",
        steps=STEPS,
        shaping="centered_ranks",
        mirrored=True,
    )
    x = START.copy()
    for _ in range(STEPS):
        rewards = []
        for member in strategy.ask():
            noise = member.sign * normal(member.seed, "x", 0, 2)
            rewards.append(-quadratic(*(x + strategy.sigma * noise)))  # larger is better here
        update = strategy.tell(rewards)
        x += sum(coefficient * normal(seed, "x", 0, 2) for seed, coefficient in update.pairs)
    return x


for name, optimise in (("cmaes", by_cmaes), ("evosax", by_evosax), ("estune.es", by_estune)):
    try:
        x = optimise()
    except ModuleNotFoundError as missing:
        print(f"{name:10} {missing}")
    else:
        print(f"{name:10} {quadratic(*x):.2g} after {STEPS * POPULATION} evaluations, at {x[0]:.3f}, {x[1]:.3f}")
