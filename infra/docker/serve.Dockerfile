# Policies and nothing else: no simulator, no judge, no compiler. `docker build -f infra/docker/serve.Dockerfile .`
ARG BASE=python:3.11.13-slim-bookworm

FROM ${BASE} AS build
ARG SOURCE=/source
ARG VENV=/opt/dualvla
COPY . ${SOURCE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv ${VENV}
RUN ${VENV}/bin/pip install --no-cache-dir --constraint ${SOURCE}/infra/docker/constraints.txt "${SOURCE}[serve]"
RUN ${VENV}/bin/dualvla --version

FROM ${BASE}
ARG VENV=/opt/dualvla
RUN apt-get update && apt-get install -y --no-install-recommends tini curl && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin dualvla
COPY --from=build ${VENV} ${VENV}
ENV PATH=${VENV}/bin:${PATH} OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 DS_BUILD_OPS=0
USER 10001:10001
WORKDIR /home/dualvla
EXPOSE 8000
ENTRYPOINT ["tini", "--"]
CMD ["dualvla", "serve", "--help"]
