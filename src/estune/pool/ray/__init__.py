"""Workers on a Ray cluster: on any number of GPUs and machines, some of which may be lost on the way.

Begin with `pool.py`. `handle.py` speaks to a worker, `worker.py` is one, `cluster.py` holds the connection.
"""
