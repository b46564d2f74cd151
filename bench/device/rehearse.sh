#!/usr/bin/env bash
# Rehearses both runs of bench/gpu.sh without a GPU, in at most ten minutes on two idle cores.
#
#     bash bench/device/rehearse.sh [FOLDER [SECONDS]]
#
# In an environment of its own, with the versions of constraints.txt and without DeepSpeed, datasets
# and jsonargparse, as on a bare CUDA image. A line a step; exits 1 if any of them fails or does not
# end in SECONDS (600). FOLDER keeps the logs, and the environment for the next rehearsal. Needs a
# package index. PYTHON says which python makes the environment.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
. bench/device/steps.sh
begin "${2:-600}" "${1:-$(mktemp -d)}"
home=$scratch
[ -n "${1-}" ] && home=$folder/environment
python=$home/bare/bin/python
export python home CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD:$PWD/kernels PYTHONPYCACHEPREFIX=$home/bytecode

# What the two runs use of the image. Beside it Triton 3.6, whose interpreter wants an older NumPy: it
# takes arrays of one element for numbers.
environment() {
    [ -e "$home/complete" ] && return
    local index=() url=https://download.pytorch.org/whl/cpu # as in the Makefile
    curl -fsI -m 3 $url/torch/ >/dev/null 2>&1 && index=(--extra-index-url $url)
    local pip=("$python" -m pip --disable-pip-version-check install -q --no-compile)
    "${PYTHON:-python3}" -m venv --clear "$home/bare" &&
        "${pip[@]}" --constraint constraints.txt "${index[@]}" torch triton transformers pytest \
            pytest-xdist hypothesis matplotlib &&
        "${pip[@]}" --no-deps --target "$home/triton-3.6" triton==3.6.0 "numpy<2.4" &&
        touch "$home/complete"
}
export -f environment

step environment 480 bash -c environment
[ ${#failed[@]} -eq 0 ] || { finish || exit 1; }
step benches 120 "$python" bench/device/answers.py
step triton-3.6 200 env TRITON_INTERPRET=1 PYTHONPATH="$home/triton-3.6:$PYTHONPATH" \
    "$python" bench/device/smoke.py --device cpu --rows 2 --scale 400
show triton-3.6 1 'a copy moves'
# Deadlines, kills and the archive.
step shell 90 "$python" -m pytest -q -p no:cacheprovider tests/bench/test_device.py
for run in 1 2; do
    step run$run 360 env PYTHON="$python" bash bench/gpu.sh $run "$work/run$run" --dry
    show run$run 20 '^=='
done
finish
