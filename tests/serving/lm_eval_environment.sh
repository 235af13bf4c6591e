#!/bin/sh
# Make an environment with lm-evaluation-harness for `test_lm_eval.py`: sh tests/serving/lm_eval_environment.sh FOLDER PYTHON
# It sees what PYTHON's environment has (torch, transformers) and adds 300 MB of its own, which must not be in that one: transformers
# imports scipy where it finds it, and every worker and replica would start later for it.
set -eu
folder=${1:?Name a folder for the environment.}
python=${2:?Name the Python of the environment to build on.}
"$python" -m venv --clear "$folder"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$(echo "$folder"/lib/python*/site-packages)/tidepool.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint requirements.lock "lm_eval==0.4.13" tenacity
"$folder/bin/python" -c 'import importlib.metadata; print("lm_eval", importlib.metadata.version("lm_eval"))'
touch "$folder/.complete"
