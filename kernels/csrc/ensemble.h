// Several teachers as one, a row a thread.
//
// Mathematics: that of kernels/distilfast_kernels/ensemble.py. Teacher by teacher, in bits, with
// y_k = log2(w_k p_k): z becomes the larger of z and y_k, and the total, in scratch, the sum of
// 2^(y_j - z). At the end z + log2(total), in natural units, times T.
#pragma once

#include "rows.h"

namespace {

template <class T>
void join(const distilfast_ensemble_args& a, int64_t k, const T* t, float* z, float* total) {
    const int64_t n_cols = a.n_cols;
    if (!a.mean) {
        const Vec weight(float(a.weights[k]));
        sweep(n_cols, [&](int64_t i, auto n, auto) {
            const Vec x = get(t + i, n, 0.f) * weight;
            put(z + i, k == 0 ? x : x + get(z + i, n, 0.f), n);
        });
        return;
    }
    const float scale = float(LOG2_E / a.temperature);
    Top top;
    sweep(n_cols, [&](int64_t i, auto n, auto part) {
        prefetch(t + i, part);
        top.add(part, get(t + i, n, -INF));
    });
    const Vec m = top.total();
    Sum l;
    const auto add = [&](int64_t i, auto n, auto part) {
        l.add(part, exp2((get(t + i, n, -INF) - m) * scale));
    };
    sum_up(n_cols, add, l);
    const Vec shift(float(::log2(a.weights[k]) - ::log2(l.total())));
    sweep(n_cols, [&](int64_t i, auto n, auto) {
        const Vec y = (get(t + i, n, -INF) - m) * scale + shift;
        if (k == 0) {
            put(z + i, y, n);
            store(total + i, 1.f);
            return;
        }
        const Vec so_far = get(z + i, n, 0.f), sum = load(total + i);
        const auto more = greater(y, so_far), same = equal(y, so_far);
        // Equal ones differ by 0, minus infinity included.
        const Vec e = exp2(select(same, 0.f, select(more, so_far - y, y - so_far)));
        store(total + i, select(more, fma(sum, e, 1.f), sum + e));
        // A NaN is not more: it has to reach z by itself.
        put(z + i, select(more, y, select(equal(y, y), so_far, y)), n);
    });
}

int combine_teachers(const distilfast_ensemble_args& a, int threads) {
    prefer_large_pages({a.z, a.stride_z, DISTILFAST_FP32}, a.n_rows);
    return for_rows(a.n_rows, a.n_cols, a.mean ? 1 : 0, threads, [&](int64_t r, auto buffer) {
        float *const z = a.z + r * a.stride_z, *const total = buffer(0);
        for (int64_t k = 0; k < a.n_teachers; k++)
            typed(a.teachers[k], r, [&](auto* t) { join(a, k, t, z, total); });
        if (!a.mean) return;
        const Vec by(float(LN_2 * a.temperature));
        sweep(a.n_cols, [&](int64_t i, auto n, auto) {
            put(z + i, (get(z + i, n, 0.f) + log2(load(total + i))) * by, n);
        });
    });
}

}  // namespace
