# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target trainer -t medssl/trainer .   runs studies
#   docker build --target mlflow  -t medssl/mlflow  .   keeps their records
# Both run as a user without rights and hold only packages pinned in requirements.lock.

FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_MODEL_CATALOG_URI="" \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
RUN groupadd --gid 10001 medssl \
    && useradd --uid 10001 --gid medssl --no-create-home --home-dir /nonexistent \
       --shell /usr/sbin/nologin medssl

FROM base AS mlflow
# The lock as constraints: the server needs a few of its packages, not torch.
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock \
    pip install --constraint /tmp/requirements.lock mlflow "psycopg[binary]"
RUN install --directory --owner=medssl --group=medssl /artifacts
ENV HOME=/tmp \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
USER medssl
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", \
     "--artifacts-destination", "/artifacts"]

FROM base AS trainer
WORKDIR /app
# The heavy packages first, in a layer that changes only with the lock.
RUN --mount=type=bind,source=requirements.lock,target=/tmp/requirements.lock \
    pip install --constraint /tmp/requirements.lock torch torchvision setuptools
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY medssl ./medssl
COPY workflows ./workflows
COPY configs ./configs
RUN pip install --constraint requirements.lock --no-build-isolation ".[imagenet-lite0]" \
    && install --directory --owner=medssl --group=medssl /app/runs /app/data
# There is no checkout in the image: docker build --build-arg MEDSSL_GIT_COMMIT=$(git rev-parse HEAD)
ARG MEDSSL_GIT_COMMIT=""
ENV HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    MEDSSL_GIT_COMMIT=${MEDSSL_GIT_COMMIT}
USER medssl
ENTRYPOINT ["medssl"]
CMD ["--help"]
