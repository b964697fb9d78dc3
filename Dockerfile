# Two images from one file. Neither holds data, a model or a key.
#
# Training, with the notebooks; a GPU: add --gpus all. Weights & Biases: add -e WANDB_API_KEY.
#   docker build --target train -t eurosat-train .
#   docker run --rm -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" eurosat-train --lr 1e-3
#
# Serving, without any training dependency; models/ is the registry, runs/ holds the journal.
#   docker build --target serve -t eurosat-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/models:/app/models:ro" -v "$PWD/runs:/app/runs" -e EUROSAT_SERVE_KEYS eurosat-serve
#
# The mounted folders must be readable, runs/ and data/ writable, by user 1000.
FROM python:3.11-slim AS base

RUN useradd --create-home --uid 1000 eurosat
WORKDIR /app
ENV PYTHONUNBUFFERED=1
COPY pyproject.toml constraints.txt settings.ini README.md LICENSE ./
COPY nbs nbs
COPY eurosat_mlops eurosat_mlops
RUN mkdir data runs models && chown eurosat: data runs models

FROM base AS train

ENV MPLBACKEND=agg
RUN pip install --no-cache-dir -c constraints.txt -e '.[train]'
USER eurosat
ENTRYPOINT ["eurosat", "train"]

FROM base AS serve

RUN pip install --no-cache-dir -c constraints.txt '.[serve,postgres]'
USER eurosat
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["eurosat", "serve", "--host", "0.0.0.0"]
