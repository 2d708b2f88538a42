# docker build -t estune .                                with CUDA and vLLM
# docker build -t estune:cpu --build-arg DEVICE=cpu .     without
# docker run --gpus all --ipc host -v "$PWD:/workspace" estune train --model Qwen/Qwen2.5-0.5B-Instruct
#
# What runs are written to is /workspace, so that they outlive the container. Downloaded models go there as well.
ARG DEVICE=cuda

# With nvcc, which vLLM's kernels are compiled by when they are first used. torch from pip is built for CUDA 13.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda
ENV EXTRAS=vllm,ray,math,gym
ENV TORCH_INDEX=

FROM ubuntu:24.04 AS cpu
ENV EXTRAS=ray,math,gym
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM ${DEVICE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/estune
ENV PATH=/opt/estune/bin:$PATH
# The one big download in a layer of its own; elsewhere vLLM says which torch it wants.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch; fi
COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir "/src[$EXTRAS]"
WORKDIR /workspace
ENV HF_HOME=/workspace/.huggingface
ENTRYPOINT ["estune"]
CMD ["--help"]
