# Run 1: are the kernels right on a GPU, and how fast are they? To be sourced by bench/gpu.sh.
begin "$(pick 300 600)" "$output"
. $device/environment.sh

tests="tests/kernels/test_triton.py tests/kernels/test_launchers.py
    tests/losses/test_losses.py tests/losses/test_losses_edges.py
    tests/losses/test_hidden_cosine.py tests/losses/test_combine_teachers.py tests/losses/test_heads.py
    tests/losses/test_linear.py tests/losses/test_operators.py"
pytest="-m pytest -q -p no:cacheprovider -p no:benchmark --no-header --tb=short"
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
metrics+=,lts__t_sector_hit_rate.pct,launch__registers_per_thread
metrics+=,launch__occupancy_limit_registers,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active

# shellcheck disable=SC2046,SC2086
{
    step smoke 75 "$python" $device/smoke.py $(pick "" "--device cpu --rows 2 --scale 400")
    show smoke 40 '^\||^smoke|a copy moves'

    step parity 120 "$python" $pytest $(pick "-n 14 --dist worksteal --maxfail=60" --collect-only) \
        -rfE -k "triton or cuda" $tests
    show parity 1 '(passed|failed|error|tests collected).* in '
    show parity 28 '^(FAILED|ERROR)'

    # Without a profiler of its own, a rehearsal launches the same kernels in the interpreter.
    profiler="ncu --clock-control none -k regex:distillation_kernel --launch-skip 1 --launch-count 1
        --metrics $metrics"
    for vocab in 30522 128256; do
        step "traffic-$vocab" 25 $(pick "$profiler" "") "$python" $device/launches.py \
            $(pick $vocab "$((vocab / 400)) --rows 1 --device cpu")
        show "traffic-$vocab" 12 '__|the loss needs'
    done

    # Every tensor in an allocation of its own, so that an overrun leaves it. Few tests: a checked
    # kernel is slow.
    step memcheck 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        $(pick "compute-sanitizer --tool memcheck --error-exitcode 9" "") "$python" $pytest \
        $(pick -x --collect-only) -W ignore tests/kernels/test_triton.py \
        -k "unaligned_rows or of_padded_rows or in_place_of or hidden_layers"
    show memcheck 6 'ERROR SUMMARY|Invalid|(passed|failed|tests collected).* in '
}
