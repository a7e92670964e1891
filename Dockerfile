# rto_megatron on NVIDIA GPUs: docker build -t rto_megatron .   (the base needs nvcc and cuDNN headers; Python 3.12)
ARG BASE_IMAGE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
FROM ${BASE_IMAGE}

# CUDA's major version picks Transformer Engine's binary: core_cu12 or core_cu13, as the base image and torch have it.
ARG TE_EXTRAS=pytorch,core_cu13
ARG TORCH=torch==2.13.0
# NVIDIA apex, from source: a tag or commit of its repository, or empty for none. (PyPI's package of that name is unrelated.)
ARG APEX_REF=

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install -y --no-install-recommends git build-essential python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv "$VIRTUAL_ENV"

# The slow layers first: a change of our code builds none of them again.
WORKDIR /opt/rto_megatron
COPY constraints.txt .
RUN pip install ${TORCH} \
 && { grep -v '^torch==' constraints.txt; pip freeze | grep '^torch=='; } > /opt/constraints.txt \
 && pip install -c /opt/constraints.txt setuptools wheel ninja packaging pybind11
RUN pip install --no-build-isolation -c /opt/constraints.txt "transformer-engine[${TE_EXTRAS}]"
RUN if [ -n "${APEX_REF}" ]; then \
      git clone --filter=blob:none https://github.com/NVIDIA/apex /tmp/apex \
      && git -C /tmp/apex checkout "${APEX_REF}" \
      && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation /tmp/apex \
      && rm -rf /tmp/apex; \
    fi
COPY . .
RUN pip install -c /opt/constraints.txt -e .

RUN userdel --remove ubuntu 2> /dev/null || true; useradd --uid 1000 --create-home trainer
# by number, which the host knows too
USER 1000
WORKDIR /home/trainer
HEALTHCHECK --interval=60s --timeout=60s --start-period=60s CMD ["python", "-m", "rto_megatron", "--version"]
ENTRYPOINT ["python", "-m", "rto_megatron"]
CMD ["--help"]
