"""The weights of a model: checkpoints, parameters, and the exact passes over them.

Imports es and noise. Begin with `weights.py`: perturb, restore, update, fingerprint. `storage.py` has the passes for
each device, `base.py` what is kept beside the live weights, `checkpoint.py` the files.
"""
