// A finished gradient times what the backward brings, in place, in fp32.
#pragma once

#include "rows.h"

namespace {

int scale(const distilfast_scale_args& a, int threads) {
    return for_rows(a.n_rows, a.n_cols, 0, threads, [&](int64_t r, auto) {
        const Vec by(a.by[r * a.by_stride]);
        typed(a.gradient, r, [&](auto* g) {
            sweep(a.n_cols, [&](int64_t i, auto n, auto k) {
                prefetch(g + i, k);
                put(g + i, get(g + i, n, 0.f) * by, n);
            });
        });
    });
}

}  // namespace
