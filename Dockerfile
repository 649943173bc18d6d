# Dependencies of the stages and flows. Weights and data are in DVC's cache and remote.
FROM python:3.11-slim

# No versions: Debian's mirrors delete old ones, so that a pinned version could not be installed later.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 dpo

COPY pyproject.toml README.md LICENSE /opt/dpo-pipeline/
COPY requirements /opt/dpo-pipeline/requirements
COPY dpo /opt/dpo-pipeline/dpo
COPY tasks /opt/dpo-pipeline/tasks
COPY flows /opt/dpo-pipeline/flows
WORKDIR /opt/dpo-pipeline
RUN export PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1 PIP_NO_BUILD_ISOLATION=0 \
    && pip install --require-hashes --requirement requirements/build.txt \
    && (pip install --require-hashes --requirement requirements/torch-cpu.txt \
        || pip install --require-hashes --requirement requirements/torch.txt) \
    && pip install --require-hashes --requirement requirements/runtime.txt \
    && pip install . && pip check

ENV DO_NOT_TRACK=true \
    DVC_NO_ANALYTICS=true \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DPO_WORKSPACE=/workspace \
    PYTHONPATH=/workspace

# A clone of the repository is mounted here. Its code is executed; the installation above provides the dependencies.
USER 1000
WORKDIR /workspace
CMD ["python", "-m", "flows.pipeline"]
