# Pipelines without a simulator: ingest, prune, teach, train, jobs. `docker build -f infra/docker/train.Dockerfile .`
# Every RUN line is also run, as it stands, by `infra/docker/check.py` in a folder of its own (no engine needed).
ARG BASE=python:3.11.13-slim-bookworm

FROM ${BASE} AS build
ARG SOURCE=/source
ARG VENV=/opt/dualvla
COPY . ${SOURCE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv ${VENV}
RUN ${VENV}/bin/pip install --no-cache-dir --constraint ${SOURCE}/infra/docker/constraints.txt "${SOURCE}[train,serve,judge,track]"
RUN ${VENV}/bin/dualvla --version

FROM ${BASE}
ARG VENV=/opt/dualvla
RUN apt-get update && apt-get install -y --no-install-recommends tini curl && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin dualvla
COPY --from=build ${VENV} ${VENV}
ENV PATH=${VENV}/bin:${PATH} OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 DS_BUILD_OPS=0
USER 10001:10001
WORKDIR /home/dualvla
ENTRYPOINT ["tini", "--"]
CMD ["dualvla", "doctor"]
