"""What a run needs, before it begins: memory and time, from a model's config.json and a machine's figures.

Begin with `run.py`. `needs.py` holds the arithmetic, `shapes.py` reads models, `machines.py` knows devices.
"""
