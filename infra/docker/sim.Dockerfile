# The whole pipeline with a simulator: all of train.Dockerfile, SAPIEN, and a Vulkan driver for CPUs (Mesa of backports:
# the one of Debian 12 offers no device that SAPIEN accepts). `docker build -f infra/docker/sim.Dockerfile .`
ARG BASE=python:3.11.13-slim-bookworm

FROM ${BASE} AS build
ARG SOURCE=/source
ARG VENV=/opt/dualvla
COPY . ${SOURCE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv ${VENV}
RUN ${VENV}/bin/pip install --no-cache-dir --constraint ${SOURCE}/infra/docker/constraints.txt "${SOURCE}[all]"
RUN ${VENV}/bin/dualvla --version

FROM ${BASE}
ARG VENV=/opt/dualvla
ARG APT=/etc/apt
RUN echo "deb http://deb.debian.org/debian bookworm-backports main" > ${APT}/sources.list.d/backports.list
RUN apt-get update && apt-get install -y --no-install-recommends tini curl libx11-6 libvulkan1 && apt-get install -y --no-install-recommends -t bookworm-backports mesa-vulkan-drivers && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin dualvla
COPY --from=build ${VENV} ${VENV}
ENV PATH=${VENV}/bin:${PATH} OMP_NUM_THREADS=1 LP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 DS_BUILD_OPS=0
USER 10001:10001
WORKDIR /home/dualvla
ENTRYPOINT ["tini", "--"]
CMD ["dualvla", "doctor"]
