# diptych serve, as a user without privileges.
#   CPU:  docker build -t diptych .
#   CUDA: docker build -t diptych --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --create-home --uid 10001 diptych
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY src ./src
RUN pip install -c constraints.txt '.[serve]'

# By number, so that a cluster can tell that it is not root.
USER 10001
WORKDIR /home/diptych

EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=5)"]
ENTRYPOINT ["diptych", "serve", "--host", "0.0.0.0"]
CMD ["toy/iomm", "toy/ovis-u1"]
