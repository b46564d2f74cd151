# Run 2: the best tiles, the peers, a training step, the driver. To be sourced by bench/gpu.sh.
begin "$(pick 400 600)" "$output"
. $device/environment.sh

csv() { echo "$work/$1.csv"; }
digest() { # NAME COLUMN...
    [ -n "$LIST" ] && return
    local name=$1
    shift
    "$python" $device/digest.py "$(csv "$name")" "$@"
}

# shellcheck disable=SC2046,SC2086,SC2012
{
    # What the image lacks; bench/device/wheels.sh has put it into .whl.
    step wheels 20 $(pick "$python -m pip install -q --no-index --no-deps --no-compile
        --no-cache-dir --target $site" "$python -m pip --version") $(ls .whl/*.whl 2>/dev/null || echo no-wheels)

    compile="--compile-only --losses kl kl_ce jsd ce reverse_kl all --jobs 14"
    step compile 45 env -u TRITON_INTERPRET "$python" bench/tune.py \
        $(pick "$compile" "--compile-only --losses kl --warps 4 --elements 8 --jobs 1")
    show compile 1 'tiles compiled'

    small="--device cpu --rows 2 --vocab 96 --warps 4 --elements 8 --losses kl --seconds 0"
    step tune 45 "$python" bench/tune.py \
        $(pick "--losses kl kl_ce jsd ce reverse_kl all --seconds 35" "$small") --csv "$(csv tune)"
    show tune 24 'best:|^\| [a-z_]+ +\| [0-9]+ +\| [0-9]+, '

    full="--device cuda --seconds 55 --vocab 30522 128256 --rows 8192"
    small="--device cpu --seconds 15 --vocab 96 --rows 4"
    step losses 75 "$python" bench/losses.py $(pick "$full" "$small") --labels none some \
        --loss kl_ce jsd ce --only "distilfast triton" "PyTorch eager" Liger \
        flash --csv "$(csv losses)"
    digest losses loss columns labels contestant time_ms copy_fraction agreement

    full="--device cuda --seconds 42"
    small="--device cpu --seconds 60 --vocab 96 --width 16 --rows 8 --dtype fp32"
    step linear 55 "$python" bench/linear.py $(pick "$full" "$small") --only "distilfast auto" \
        "PyTorch eager, fp32" "Liger JSD" "Liger KL" "Liger CE" flash --csv "$(csv linear)"
    digest linear loss columns width contestant time_ms gemm_ratio agreement

    full="--device cuda --seconds 6 --shape bert"
    small="--device cpu --seconds 0 --shape minilm --sequences 1 --length 8 --dtype fp32 --only same"
    step step 40 env -u TRITON_INTERPRET "$python" bench/step.py $(pick "$full" "$small") --csv "$(csv step)"
    digest step shape sequences contestant step_ms step_ms_p20 step_ms_p80

    full="--device cuda --seconds 12"
    small="--device cpu --seconds 60 --vocab 96 --width 16 --rows 8 16 --dtype fp32"
    step memory 20 "$python" bench/linear.py --memory $(pick "$full" "$small") \
        --csv "$(csv memory)"
    digest memory rows columns width contestant peak_mib gradients_mib

    step driver 60 "$python" -m pytest -q -p no:cacheprovider -p no:benchmark --no-header \
        --tb=short -rfEs -W default $(pick "-n 4" --collect-only) \
        -k "plain_loop or micro_batches or thousand_gradients or on_a_gpu" \
        $(ls tests/driver/test_driver.py tests/test_engine*.py 2>/dev/null)
    show driver 1 '(passed|failed|error|tests collected).* in '
    show driver 12 '^(FAILED|ERROR|SKIPPED)'

    # Last, as torch.compile takes long to get ready and max-autotune is not begun after 12 s.
    full="--device cuda --seconds 12 --vocab 30522 --rows 8192"
    small="--device cpu --seconds 1 --vocab 96 --rows 4"
    step compiled 40 "$python" bench/losses.py $(pick "$full" "$small") --labels some \
        --loss kl_ce --only "distilfast triton" torch.compile --csv "$(csv compiled)"
    digest compiled loss columns labels contestant time_ms copy_fraction agreement
}
