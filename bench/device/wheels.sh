#!/usr/bin/env bash
# Fetches the wheels that a bare CUDA image lacks into .whl, for run 2 of bench/gpu.sh.
#
#     bash bench/device/wheels.sh        # where there is a package index; take .whl along
#
# The image is expected to have Python 3.12, torch, triton, transformers, pytest with xdist,
# hypothesis, matplotlib, pandas, pyarrow, scikit-learn, tensorboard, accelerate and rich. The driver
# also needs DeepSpeed, datasets and jsonargparse; the benches compare with Liger and
# flash-linear-attention. Nothing compiled is among them but pydantic's core.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3}
folder=.whl failed=()
rm -rf $folder
pip=("$python" -m pip --disable-pip-version-check)
platform=(--only-binary=:all: --python-version 3.12 --implementation cp
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64
    --platform manylinux2014_x86_64)

pinned() { grep -i "^$1==" constraints.txt; } # NAME -> NAME==VERSION
download() { "${pip[@]}" download -q -d $folder "${platform[@]}" "$@" || failed+=("${*: -1}"); }

# datasets asks for a multiprocess below 0.70.20 and a dill below 0.4.2
for name in "$(pinned datasets)" "multiprocess<0.70.20" "dill<0.4.2" "$(pinned jsonargparse)" \
    docstring_parser typeshed_client hjson einops "liger-kernel>=0.8" "fla-core>=0.6"; do
    download --no-deps "$name"
done
download pydantic # with its core of the same version
# DeepSpeed is published as a source; none of its operators is built.
DS_BUILD_OPS=0 "${pip[@]}" wheel -q --no-deps -w $folder "$(pinned deepspeed)" ||
    failed+=(deepspeed)

ls $folder
du -sh $folder
[ ${#failed[@]} -eq 0 ] || { echo "missing: ${failed[*]}" && exit 1; }
