# megatron-r1 on NVIDIA GPUs. docs/container.md says how to use it, and what of it has not been run.
#   docker build --tag megatron-r1:gpu .
#
# Of NGC's PyTorch image this takes Ubuntu, CUDA with its compiler and headers, and the network's libraries (HPC-X, UCX,
# rdma-core). Its own torch is left alone: vLLM's wheels fit one version of torch, and trainer and engines have to load
# one NCCL, so all of Python is in a virtual environment of its own, as pinned in requirements/gpu.lock.
ARG NGC=nvcr.io/nvidia/pytorch:25.11-py3

FROM ${NGC} AS base
# bubblewrap is for code rewards. Versions of Ubuntu's packages are the release's, which the tag above pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bubblewrap python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
# Without NGC's constraints of pip, and without its torch on the loader's path.
ENV PIP_CONSTRAINT= \
    LD_LIBRARY_PATH=/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64
WORKDIR /opt/megatron-r1

FROM base AS build
# The user of the image cannot write bytecode beside the sources.
ENV UV_COMPILE_BYTECODE=1
# The packages before the sources, so that a change of sources leaves their layers.
COPY requirements requirements
RUN python3.12 -m venv .venv && requirements/install.sh .venv requirements/gpu.lock
# 32 files of C++, no kernels: those come with transformer-engine-cu13. CPATH: the headers of the very libraries that
# torch loads, before those of NGC's.
ARG MAX_JOBS=16
ENV NVTE_PYTORCH_FORCE_BUILD=TRUE
RUN .venv/bin/python -m pip install --no-cache-dir wheel==0.45.1 \
    && CPATH=$(printf '%s:' "$PWD"/.venv/lib/python3.12/site-packages/nvidia/*/include) \
        .venv/bin/python -m pip install --no-cache-dir --no-build-isolation --no-deps \
        --requirement requirements/transformer_engine.lock
COPY . .
RUN .venv/bin/python -m pip install --no-cache-dir --no-deps --no-index --no-build-isolation --editable . \
    && .venv/bin/megatron-r1 doctor --quick

FROM base
RUN useradd --uid 1001 trainer && install --directory --mode=1777 runs /home/trainer
COPY --from=build /opt/megatron-r1 .
# USER and HOME are for `docker run --user`, whose user has no name here.
ENV PATH=/opt/megatron-r1/.venv/bin:$PATH OMP_NUM_THREADS=1 USER=trainer HOME=/home/trainer
USER 1001:1001
HEALTHCHECK --interval=5m --timeout=60s --start-period=1m CMD ["megatron-r1", "doctor", "--quick"]
CMD ["megatron-r1", "doctor"]
