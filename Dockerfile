# An image for NVIDIA GPUs. It has not been built yet: no Docker daemon and no GPU were at hand.
#   docker build -t megatron-sse .
#   docker run --rm -it --gpus all --ipc host --ulimit memlock=-1 -v "$PWD:/run" megatron-sse train quickstart.yaml
# It needs a driver that fits the base image, NVIDIA's container toolkit, and --ipc host (NCCL and the loaders share
# memory). The base brings torch, Triton, Transformer Engine and NCCL, which belong together: take one with Python 3.12
# or newer and Triton 3.7.1 or newer (`megatron-sse doctor` checks), and do not install others over them.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

COPY . /source
# All pins but those of what the base brings.
RUN grep -vE '^(torch|triton|transformer-engine|numpy|setuptools)==' /source/constraints.txt > /tmp/pins.txt \
    && PIP_CONSTRAINT=/tmp/pins.txt pip install --no-cache-dir "/source[hf,data,plot]" \
    && rm -rf /source /tmp/pins.txt

WORKDIR /run
ENTRYPOINT ["megatron-sse"]
CMD ["--help"]
