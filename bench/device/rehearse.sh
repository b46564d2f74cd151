#!/usr/bin/env bash
# Rehearses both runs of bench/gpu.sh without a GPU, in at most ten minutes on two cores.
#
#     bash bench/device/rehearse.sh [FOLDER]
#
# In an environment of its own, with the versions of constraints.txt and without DeepSpeed, datasets
# and jsonargparse, as on a bare CUDA image. A line a step; exits 1 if any of them fails. FOLDER
# keeps the logs. Needs a package index. PYTHON says which python makes the environment.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
. bench/device/steps.sh
begin 600 "${1:-$(mktemp -d)}"
python=$scratch/bare/bin/python
export python scratch CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/bench PYTHONPYCACHEPREFIX=$scratch/bytecode

# What the two runs use of the image. Beside it Triton 3.6, whose interpreter wants an older NumPy: it
# takes arrays of one element for numbers.
environment() {
    local index=() url=https://download.pytorch.org/whl/cpu # as in the Makefile
    curl -fsI -m 3 $url/torch/ >/dev/null 2>&1 && index=(--extra-index-url $url)
    local pip=("$python" -m pip --disable-pip-version-check install -q --no-compile)
    "${PYTHON:-python3}" -m venv "$scratch/bare" &&
        "${pip[@]}" --constraint constraints.txt "${index[@]}" torch triton transformers pytest \
            pytest-xdist hypothesis matplotlib &&
        "${pip[@]}" --no-deps --target "$scratch/triton-3.6" triton==3.6.0 "numpy<2.4"
}
export -f environment

step environment 300 bash -c environment
[ ${#failed[@]} -eq 0 ] || { finish || exit 1; }
step benches 90 "$python" bench/device/answers.py
step triton-3.6 120 env TRITON_INTERPRET=1 PYTHONPATH="$scratch/triton-3.6:$PYTHONPATH" \
    "$python" bench/device/smoke.py --device cpu --rows 4 --scale 400
# Deadlines, kills and the archive.
step shell 60 "$python" -m pytest -q -p no:cacheprovider tests/test_device.py
for run in 1 2; do
    step run$run 240 env PYTHON="$python" bash bench/gpu.sh $run "$work/run$run" --dry
    show run$run 20 '^=='
done
finish
