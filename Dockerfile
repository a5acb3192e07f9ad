# docker build -t vitgal . && docker run --rm -v "$PWD/runs:/project/runs" vitgal run params/demo.yaml
# Versions are those of constraints.txt; Python 3.11 to 3.13.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
RUN apt-get update && apt-get install -y --no-install-recommends make git chromium \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
# Packages first: a change of the code leaves this layer as it is.
COPY pyproject.toml constraints.txt setup.py Makefile README.md LICENSE ./
RUN mkdir vitgal && touch vitgal/__init__.py && make .venv/.installed
COPY . .
RUN touch .venv/.installed
ENV PATH=/project/.venv/bin:$PATH OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["vitgal"]
CMD ["--help"]
