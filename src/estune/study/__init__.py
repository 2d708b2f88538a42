"""What is done around runs: estimates before, probes and sweeps, comparisons with RL, reports after.

Imports run and trl. Each module or package here is a command of its own.
"""
