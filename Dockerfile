# docker build -t staff . && docker run --rm staff      (the demo: a few minutes on 2 CPU cores; no GPU)
# Written for a machine that reaches PyPI and PyTorch's index; it has not been built where this file was written.
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /staff
COPY . .
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && .venv/bin/pip install --no-cache-dir '.[gguf]' && touch .venv/ready
CMD ["make", "demo"]
