#!/usr/bin/env bash
# Everything that a GPU can tell, in under ten minutes:
#
#     bash bench/gpu.sh FOLDER
#
# Parity of the compiled kernels on full shapes, compute-sanitizer on small ones, the tuning of tiles
# and warps, a whole training step, the losses and the fused head against the peers that are installed,
# the head's peak memory and its chunks, a kernel profile. Every step writes a log and its tables to
# FOLDER; a step that fails does not stop the next, and is named at the end. It needs torch with CUDA,
# triton, transformers, pytest, hypothesis and matplotlib; nothing has to be installed of the project
# itself. PYTHON says which python.
set -uo pipefail
folder=$(mkdir -p "${1:?usage: bash bench/gpu.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=()
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no CUDA device")' || exit 2

step() { # name, seconds, command ...
    local name=$1 seconds=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    if timeout --kill-after=10 "$seconds" "$@" >"$folder/$name.log" 2>&1; then
        echo "   ok, $((SECONDS - began)) s"
    else
        echo "   FAILED with status $?, $((SECONDS - began)) s; the end of $name.log:"
        tail -n 15 "$folder/$name.log" | sed 's/^/   | /'
        failed+=("$name")
    fi
}

tests="tests/test_losses.py tests/test_losses_edges.py tests/test_hidden_cosine.py
    tests/test_combine_teachers.py tests/test_heads.py tests/test_linear.py tests/test_operators.py
    tests/test_triton.py"
step machine 30 "$python" bench/measure.py --device cuda
# shellcheck disable=SC2086
step parity 150 "$python" -m pytest -q -p no:cacheprovider -k "triton or cuda" $tests
if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1) &&
    [ -n "$sanitizer" ]; then
    step sanitizer 70 "$sanitizer" --tool memcheck --error-exitcode 9 "$python" -m pytest -q -x \
        -p no:cacheprovider tests/test_triton.py tests/test_heads.py \
        -k "poisoned or label or boundary or (triton and temperature)"
else
    echo "== sanitizer: skipped, compute-sanitizer is not installed"
fi
step tune 75 "$python" bench/tune.py --seconds 45 --csv "$folder/tune.csv"
step step 50 "$python" bench/step.py --device cuda --seconds 10 --csv "$folder/step.csv"
step losses 80 "$python" bench/losses.py --device cuda --seconds 50 --csv "$folder/losses.csv" \
    --json "$folder/losses.json" --plot "$folder/losses.png" --profile "$folder/trace.json"
step linear 90 "$python" bench/linear.py --device cuda --seconds 65 --csv "$folder/linear.csv" \
    --json "$folder/linear.json" --plot "$folder/linear.png"
step memory 25 "$python" bench/linear.py --memory --device cuda --seconds 15 \
    --csv "$folder/memory.csv"
step chunks 25 "$python" bench/chunks.py --device cuda --seconds 8 --csv "$folder/chunks.csv"

echo "results in $folder after $SECONDS s"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" && exit 1; }
