"""Evolution Strategies as ask and tell: members out, rewards in, updates out. No tensors, no models.

Imports noise alone. Begin with `strategy.py`.
"""
