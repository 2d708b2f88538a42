"""The same model, data, rewards and budget through Evolution Strategies and through TRL's reinforcement learning.

- `plan.py`: what is compared, as jobs
- `train.py`: one job, ES or TRL, in a process of its own
- `measure.py`: how good a trained checkpoint is, the same code for all methods
- `run.py`: all jobs, resumable
- `report.py`: table and picture
"""
