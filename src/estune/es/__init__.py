"""Evolution Strategies as ask and tell: members out, rewards in, updates out. No tensors, no models.

A small library by itself: it imports noise alone, and NumPy. Begin with `strategy.py`.
"""

from estune.es.adam import Adam
from estune.es.earlier import Momentum
from estune.es.evolution import EvolutionStrategy
from estune.es.guided import Guided
from estune.es.schedule import Schedule
from estune.es.sharpness import SharpnessAware
from estune.es.strategy import Member, Strategy, Update

__all__ = [
    "Adam",
    "EvolutionStrategy",
    "Guided",
    "Member",
    "Momentum",
    "Schedule",
    "SharpnessAware",
    "Strategy",
    "Update",
]
