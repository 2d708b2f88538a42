import os,time
import torch, transformers
t=time.process_time()
import ray
print("ray", time.process_time()-t, os.listdir("/proc/self/task"))
t=time.process_time()
import ray._private.worker, ray._private.node, estune.pool.ray.worker
import ray.cluster_utils
from ray._private.async_compat import try_install_uvloop
try_install_uvloop()
print("more", time.process_time()-t, os.listdir("/proc/self/task"))
