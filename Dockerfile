# The image of rayjob.yaml's pods: Ray's own, with the project and what it needs. PyTorch's packages bring CUDA.
#
#   docker build --build-arg ACW_COMMIT=$(git rev-parse HEAD) -t REGISTRY/acw:ray-2.60.0 . && docker push ...
FROM rayproject/ray:2.60.0-py311

# Without it NVIDIA's runtime shows a container the GPU but not its compute library.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true

COPY --chown=ray:users . /home/ray/acw
RUN pip install --no-cache-dir '/home/ray/acw[lite,cluster]'

ARG ACW_COMMIT=unknown
ENV ACW_COMMIT=$ACW_COMMIT
WORKDIR /home/ray/acw
