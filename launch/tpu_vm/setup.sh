#!/usr/bin/env bash
# Prepares one TPU VM: llmjax in ~/venv and a token store in ~/store, both from a bucket. Edit it to your needs.
#   setup.sh gs://BUCKET/llmjax
# The folder holds llmjax-*.whl, constraints.txt and store/, as docs/launch_cloud.md uploads them. TPU images come with
# Python 3.10 and llmjax needs 3.11, so uv installs a newer one. Running it again is quick.
set -euo pipefail
folder=${1:?setup.sh: error: give the folder of the bucket, such as gs://my-bucket/llmjax}
mkdir -p wheels store
gcloud storage cp "$folder/llmjax-*.whl" "$folder/constraints.txt" wheels/
python3 -m pip install --user --quiet uv
python3 -m uv venv --quiet --allow-existing --python=3.12 venv
for wheel in wheels/llmjax-*.whl; do
  python3 -m uv pip install --quiet --python=venv/bin/python --constraint=wheels/constraints.txt "${wheel}[tpu,gcs]"
done
gcloud storage rsync --recursive "$folder/store" store
