// The cosine distance of hidden states and its gradient, a row of a layer a thread.
//
// Mathematics: that of kernels/distilfast_kernels/hidden_cosine.py.
//
//     1 - s.t / (|s| |t|),   d/ds = (s.t / s.s  s - t) / (|s| |t|)
//
// A row is a few KB, so that the second sweep reads it from L1.
#pragma once

#include "rows.h"

namespace {

// What the row counts: 0 outside the mask, and where its scale is 0.
double weight_of(const distilfast_cosine_args& a, int64_t r) {
    if (a.scale[r * a.scale_stride] == 0) return 0;
    return a.mask ? a.mask[r] : 1;
}

template <class S, class T, class G>
void cosine_row(const distilfast_cosine_args& a, int64_t r, const S* s, const T* t, G* g) {
    const double weight = weight_of(a, r);
    if (weight == 0) {
        if (g) memset((void*)g, 0, a.n_cols * sizeof(G));
        return;
    }
    const Products found = add_products<false>(s, t, a.n_cols);
    a.rows[r] += float(found.distance * a.share * weight);
    if (!g) return;
    const Vec by(float(a.scale[r * a.scale_stride] * weight * a.share * found.by));
    sweep(a.n_cols, [&](int64_t i, auto n, auto) {
        const Vec u = get(s + i, n, 0.f), w = get(t + i, n, 0.f);
        const Vec x = drop(u, u, w), y = drop(w, u, w);
        put(g + i, fma(x, found.ratio, Vec(0.f) - y) * by, n);
    });
}

int hidden_cosine(const distilfast_cosine_args& a, int threads) {
    const bool mixed = a.student.dtype != a.teacher.dtype;
    prefer_large_pages(a.gradient, a.n_rows);
    return for_rows(a.n_rows, a.n_cols, mixed, threads, [&](int64_t r, auto buffer) {
        const bool needed = weight_of(a, r) != 0;
        typed_pair(a.student, a.teacher, r, a.n_cols, needed, buffer(0), [&](auto* s, auto* t) {
            using S = std::remove_pointer_t<decltype(s)>;
            const int64_t at = r * a.gradient.stride;
            if (!a.gradient.data)
                cosine_row(a, r, s, t, (S*)nullptr);
            else if (a.gradient.dtype == a.student.dtype)
                cosine_row(a, r, s, t, (S*)a.gradient.data + at);
            else
                cosine_row(a, r, s, t, (float*)a.gradient.data + at);
        });
    });
}

}  // namespace
