# A CPU image of the server. Build: docker build -t herdling .
# Run:    docker run -p 8080:8080 -v "$PWD/runs/demo/model:/opt/ml/model:ro" herdling
# The argument is a verb, `serve` as SageMaker gives it; more flags may follow it.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY herdling herdling
# An index with CPU-only wheels of torch makes the image smaller by gigabytes.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/herdling \
 && /opt/herdling/bin/pip install --no-cache-dir -c constraints.txt ".[serve,grammar]"

FROM python:3.11-slim
COPY --from=build /opt/herdling /opt/herdling
RUN useradd --create-home herdling
USER herdling
ENV PATH=/opt/herdling/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HERDLING_MODEL=/opt/ml/model \
    HERDLING_NAME=model \
    HERDLING_HOST=0.0.0.0 \
    HERDLING_PORT=8080
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["herdling"]
CMD ["serve"]
