"""Workers on a Ray cluster as a pool: on any number of GPUs and machines, some of which may be lost on the way.

Begin with `pool.py`. `crew.py` keeps up the number of workers, `handle.py` speaks to one, `worker.py` is one.
"""
