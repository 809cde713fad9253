# This project in an image of NeMo 2.4, which brings torch, NeMo, Megatron-Core 0.13, Transformer Engine
# and the kernels. Tag 25.07 should be that generation (the build fails if it is not); 25.09 has NeMo 2.5, and from 26.04 on there is no NeMo in it. The
# registry is yours to name:
#   docker build --build-arg NEMO_IMAGE=<your registry>/nvidia/nemo --tag phimr-nemo .
# For Slurm: enroot import dockerd://phimr-nemo (pyxis) or apptainer build phimr-nemo.sif docker-daemon://phimr-nemo:latest
ARG NEMO_IMAGE=nvidia/nemo
ARG NEMO_TAG=25.07
FROM ${NEMO_IMAGE}:${NEMO_TAG}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/phimr-nemo
# The image's own constraints hold what it is made of at its versions; they would hold what is added here too.
ENV PIP_CONSTRAINT=

# Aligner and its neighbours without what they ask for: the image has it, or the code does not need it. What the image
# has of them stays: a newer modelopt breaks its torch.
COPY requirements/aligner.txt requirements/
RUN while IFS= read -r requirement; do \
        python3 -m pip show --quiet "${requirement%%==*}" \
            || python3 -m pip install --no-cache-dir --no-deps "$requirement"; \
    done <requirements/aligner.txt

# What the image lacks, at the tested versions; math-verify's answers depend on antlr's version.
RUN python3 -m pip install --no-cache-dir \
        antlr4-python3-runtime==4.9.3 \
        datasketch==1.6.5 \
        duckdb==1.5.6 \
        math-verify==0.9.0 \
        prometheus_client==0.26.0 \
        tenacity==9.2.1

COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation -e .

# Fails the build on an image of another generation.
RUN python3 -c "from phimr_nemo.jobs.node import REPORTED, check_versions, installed_versions; \
        check_versions('grpo', installed_versions(REPORTED))" \
    && phimr --help >/dev/null
