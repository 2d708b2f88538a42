"""TRL's interface: `ESTrainer` and `ESConfig` in the place of `GRPOTrainer` and `GRPOConfig`.

Imports run. Begin with `trainer.py`.
"""
