# The training image. The serving image arrives with the service, as a target of its own without any training dependency.
#   docker build --target train -t eurosat-train .
#   docker run --rm -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" eurosat-train --lr 1e-3
# A GPU: add --gpus all. Weights & Biases: add -e WANDB_API_KEY, so that the key never enters the image.
# The mounted folders must be writable by user 1000.
FROM python:3.11-slim AS train

RUN useradd --create-home --uid 1000 eurosat
WORKDIR /app
ENV PYTHONUNBUFFERED=1 MPLBACKEND=agg

COPY pyproject.toml constraints.txt settings.ini README.md LICENSE ./
COPY eurosat_mlops eurosat_mlops
RUN pip install --no-cache-dir -c constraints.txt -e '.[train]'
COPY nbs nbs
RUN mkdir data runs models && chown eurosat: data runs models

USER eurosat
ENTRYPOINT ["eurosat", "train"]
