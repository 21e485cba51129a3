# The image that every pod or node runs: kinoray, its dependencies at the versions of constraints.txt, and jobs/.
#
#   docker build -t registry.example.com/kinoray:0.1.0 .
#
# torch comes from PyPI with the CUDA libraries it needs, so the image serves CPU and GPU nodes alike; a GPU node adds its
# driver. Videos are decoded by the libraries inside the av package: no ffmpeg.
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY platform platform
COPY models models
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm
# wget: KubeRay's probes; openssh-client and rsync: Ray's cluster launcher. No compiler: optim.compile needs gcc, too.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home kinoray
COPY constraints.txt /opt/kinoray/constraints.txt
# Dependencies before kinoray: a change of kinoray's own code then builds and moves a small layer.
COPY --from=wheel /src/pyproject.toml /tmp/project/pyproject.toml
RUN python -c "import tomllib; print(*tomllib.load(open('/tmp/project/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --constraint /opt/kinoray/constraints.txt --requirement /tmp/requirements.txt \
    && rm -rf /tmp/requirements.txt /tmp/project
COPY --from=wheel /wheel /tmp/wheel
RUN python -m pip install --no-cache-dir --no-deps /tmp/wheel/*.whl && rm -rf /tmp/wheel
COPY jobs /opt/kinoray/jobs
ENV RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
WORKDIR /opt/kinoray
USER 1000:1000
CMD ["kinoray", "--help"]
