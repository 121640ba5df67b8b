#!/bin/bash
# One TPU pod: create it, install on all hosts, train. Again: the run goes on.
#
#   NAME=my-pod ZONE=europe-west4-b TYPE=v5litepod-16 BUCKET=my-bucket ./tpu_pod.sh
#
# Every host runs the same command at once (--worker=all); jax finds the others.
set -euo pipefail
: "${NAME:?name of the pod}" "${ZONE:?}" "${TYPE:?such as v5litepod-16}" "${BUCKET:?}"
# What pip installs: the package's name, or an address such as git+https://HOST/ORG/uoe_jax
SOURCE="${SOURCE:-uoe_jax}"
case "$SOURCE" in
  *://*) SOURCE="uoe_jax[tpu,gs,data] @ $SOURCE" ;;
  *) SOURCE="${SOURCE}[tpu,gs,data]" ;;
esac

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" > /dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --version="${VERSION:-v2-alpha-tpuv5-lite}"
fi
on_all_hosts "python3 -m venv ~/uoe && ~/uoe/bin/pip install -q '${SOURCE}'"
# The corpus is prepared by the first host and fetched by the others; SIGTERM at any host
# saves, and stops all after the same step.
on_all_hosts "~/uoe/bin/uoe train 1b-union --distributed --layout.device-order ring \
  --mesh.fsdp 16 --data.cache-dir gs://${BUCKET}/data --run-dir gs://${BUCKET}/runs/1b-union"
