// A chunk's share of a gradient, in 16 bits, added to the sum in fp32: one pass. PyTorch widens the
// share first, to as much memory again.
#pragma once

#include "rows.h"

namespace {

int accumulate(const distilfast_accumulate_args& a, int threads) {
    return for_rows(a.n_rows, a.n_cols, 0, threads, [&](int64_t r, auto) {
        float* const total = a.total + r * a.stride_total;
        typed(a.share, r, [&](auto* x) {
            sweep(a.n_cols, [&](int64_t i, auto n, auto k) {
                prefetch(x + i, k), prefetch(total + i, k);
                const Vec share = get(x + i, n, 0.f);
                put(total + i, a.begun ? get(total + i, n, 0.f) + share : share, n);
            });
        });
    });
}

}  // namespace
