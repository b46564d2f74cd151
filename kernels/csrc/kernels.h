// The losses and their gradients, a row a thread. The mathematics is that of
// kernels/distilfast_kernels/distillation.py: x = c s - m in bits, m the maximum rounded up to a whole
// number, e = 2^x, sums over the row.
//
// A row pair is read from memory once and stays in L2 for the next sweeps. The exponentials are
// computed once and kept, in fp32, in a scratch of the thread's own, which stays in L2 too:
//
//     1. the maxima              reads s, t
//     2. exponentials and sums   reads s, t, writes e_s, e_t
//     (JSD: the distances from the mixture, over e_t)
//     3. the gradient            reads e_s, e_t, writes g
//
// This file is compiled once for each instruction set (avx512.cpp, avx2.cpp, plain.cpp).
#pragma once

#include "distilfast.h"
#include "vec.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>

#include <type_traits>

namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr float TINY = 1.2e-38f;  // about the smallest normal number
constexpr float NOT_A_NUMBER = NAN;

enum { NO_KD = DISTILFAST_NO_KD, FORWARD_KL, REVERSE_KL, JSD };

// f(i, n) for the n <= WIDTH elements from i on; whole vectors know their n when compiled.
template <class F>
inline void sweep(int64_t n_cols, F f) {
    int64_t i = 0;
    for (; i + WIDTH <= n_cols; i += WIDTH) f(i, std::integral_constant<int, WIDTH>());
    if (i < n_cols) f(i, int(n_cols - i));
}
template <class E, class N>
inline Vec get(const E* p, N n, float other) {
    if constexpr (std::is_same_v<N, int>)
        return load(p, n, other);
    else
        return load(p);
}
template <class E, class N>
inline void put(E* p, Vec x, N n) {
    if constexpr (std::is_same_v<N, int>)
        store(p, x, n);
    else
        store(p, x);
}

// A sum over a row, in several parts so that additions need not wait for one another.
struct Sum {
    Vec part[4] = {0.f, 0.f, 0.f, 0.f};
    void add(int64_t i, Vec x) { part[i / WIDTH & 3] = part[i / WIDTH & 3] + x; }
    double total() const { return double(sum((part[0] + part[1]) + (part[2] + part[3]))); }
};

// x - y, finite where x is minus infinity: 0 log 0 = 0, as 2^x is 0 there. Where 2^x is not 0 the
// difference is above -127, so the bound changes nothing. The maximum of NaN and a number is that.
inline Vec gap(Vec x, Vec y) { return max(x - y, -1024.f); }

// Columns that both sides rule out have no part in cosine and MSE.
inline Vec drop(Vec x, Vec s, Vec t) { return select(both(equal(s, -INF), equal(t, -INF)), 0.f, x); }

// e^power for 1, 2, 3, 4.
inline Vec power_of(Vec e, int power) {
    const Vec square = power > 1 ? e * e : e;
    return power == 4 ? square * square : power == 3 ? square * e : square;
}

struct Scratch {
    float *e_s, *e_t, *extra, *teacher;
};

// What a row comes to.
struct Row {
    float scale = 0, temperature = 1, top_s = 0, top_t = 0, top_1 = 0;
    int power = 1;  // T where e_1 = 2^(T x_s) is a small power of e_s; else 0, and e_1 has top_1
    double l_s = 0, l_t = 0, d = 0, l_1 = 0;
    // the gradient's factors
    float by_s = 0, by_t = 0, mean = 0, spoilt = 0, by_1 = 0;

    Vec x_s(Vec s) const { return fma(s, scale, -top_s); }
    Vec x_t(Vec t) const { return fma(t, scale, -top_t); }
    template <class S, class N>
    Vec e_1(Vec e_s, const S* s, N n) const {
        Vec x;
        return power ? power_of(e_s, power) : exp2_of(get(s, n, -INF), float(LOG2_E), top_1, x);
    }
};

template <class S, class T>
void find_tops(Row& row, const S* s, const T* t, bool kd, int64_t n_cols) {
    Vec top_s[2] = {-INF, -INF}, top_t[2] = {-INF, -INF};
    sweep(n_cols, [&](int64_t i, auto n) {
        const int k = i / WIDTH & 1;
        top_s[k] = max(get(s + i, n, -INF), top_s[k]);
        if (kd) top_t[k] = max(get(t + i, n, -INF), top_t[k]);
    });
    const float top = highest(max(top_s[0], top_s[1]));
    row.top_s = ceilf(row.scale * top);
    row.top_1 = ceilf(float(LOG2_E) * top);
    row.top_t = ceilf(row.scale * highest(max(top_t[0], top_t[1])));
}

template <int KD, bool CE, class S, class T>
void add_up(Row& row, const S* s, const T* t, const Scratch& scratch, int64_t n_cols) {
    Sum l_s, l_t, d, l_1;
    sweep(n_cols, [&](int64_t i, auto n) {
        Vec x_s, x_t;
        const Vec e_s = exp2_of(get(s + i, n, -INF), row.scale, row.top_s, x_s);
        store(scratch.e_s + i, e_s);
        if constexpr (KD != NO_KD) {
            const Vec e_t = exp2_of(get(t + i, n, -INF), row.scale, row.top_t, x_t);
            store(scratch.e_t + i, e_t);
            l_s.add(i, e_s);
            l_t.add(i, e_t);
            if constexpr (KD == FORWARD_KL) d.add(i, e_t * gap(x_t, x_s));
            if constexpr (KD == REVERSE_KL) d.add(i, e_s * gap(x_s, x_t));
        }
        if constexpr (CE) l_1.add(i, row.e_1(e_s, s + i, n));
    });
    row.l_s = l_s.total(), row.l_t = l_t.total(), row.d = d.total(), row.l_1 = l_1.total();
}

// JSD: against M = beta p_t + (1 - beta) p_s, times l_s. Leaves log2(p_s / M) over e_t.
template <class S, class T>
double add_jsd(Row& row, const S* s, const T* t, const Scratch& scratch, int64_t n_cols, double beta) {
    const float share_s = float(1 - beta), share_t = float(beta * row.l_s / row.l_t);
    Sum a, b;
    sweep(n_cols, [&](int64_t i, auto n) {
        const Vec e_s = load(scratch.e_s + i), e_t = load(scratch.e_t + i);
        const Vec mixture = log2(max(fma(e_s, share_s, e_t * Vec(share_t)), TINY));
        const Vec from_m = gap(row.x_s(get(s + i, n, -INF)), mixture);
        a.add(i, e_t * gap(row.x_t(get(t + i, n, -INF)), mixture));
        b.add(i, e_s * from_m);
        store(scratch.e_t + i, from_m);
    });
    const double kl_s = b.total() / row.l_s;
    row.mean = float(kl_s);
    return beta * (a.total() / row.l_t + ::log2(row.l_s / row.l_t)) + (1 - beta) * kl_s;
}

template <int KD, bool CE, class S, class T, class N>
inline Vec gradient_at(
    const Row& row, const S* s, const T* t, const Scratch& scratch, bool extra, int64_t i, N n) {
    Vec g(0.f);
    if constexpr (KD == FORWARD_KL)
        g = fma(load(scratch.e_s + i), row.by_s, load(scratch.e_t + i) * Vec(-row.by_t));
    if constexpr (KD == REVERSE_KL) {
        const Vec apart = gap(row.x_s(get(s + i, n, -INF)), row.x_t(get(t + i, n, -INF)));
        g = fma(load(scratch.e_s + i) * (apart - Vec(row.mean)), row.by_s, row.spoilt);
    }
    if constexpr (KD == JSD)
        g = load(scratch.e_s + i) * (load(scratch.e_t + i) - Vec(row.mean)) * Vec(row.by_s);
    if constexpr (CE) g = fma(row.e_1(load(scratch.e_s + i), s + i, n), row.by_1, g);
    if (extra) g = g + load(scratch.extra + i);
    return g;
}

template <int KD, bool CE, class S, class T>
void write_gradient(
    const Row& row, const S* s, const T* t, S* g, const Scratch& scratch, bool extra, int64_t n_cols,
    int64_t label, float by_label) {
    float at_label = 0;
    if (CE) {  // before the row is overwritten, if g is s
        const int64_t i = label / WIDTH * WIDTH;
        float block[WIDTH];
        const int n = int(n_cols - i < WIDTH ? n_cols - i : WIDTH);
        store(block, n < WIDTH ? gradient_at<KD, CE>(row, s, t, scratch, extra, i, n)
                               : gradient_at<KD, CE>(row, s, t, scratch, extra, i,
                                                     std::integral_constant<int, WIDTH>()));
        at_label = block[label - i] - by_label;
    }
    sweep(n_cols, [&](int64_t i, auto n) {
        put(g + i, gradient_at<KD, CE>(row, s, t, scratch, extra, i, n), n);
    });
    if (CE) narrow(g[label], at_label);
}

struct Cosine {
    double distance;
    float ratio, by;  // the gradient: by (ratio s - t)
};

// Sums of s s, t t, s t and, where asked for, (s - t)^2.
template <class S, class T>
Cosine add_products(const S* s, const T* t, int64_t n_cols, double* squares) {
    Sum ss, tt, st, sq;
    sweep(n_cols, [&](int64_t i, auto n) {
        const Vec x = get(s + i, n, 0.f), y = get(t + i, n, 0.f);
        const Vec a = drop(x, x, y), b = drop(y, x, y);
        ss.add(i, a * a);
        tt.add(i, b * b);
        st.add(i, a * b);
        if (squares) sq.add(i, (a - b) * (a - b));
    });
    if (squares) *squares = sq.total();
    const double s2 = ss.total(), t2 = tt.total(), dot = st.total();
    // A zero vector has no direction: distance 1, gradient 0. A NaN is no zero.
    if ((s2 == 0 || t2 == 0) && s2 + t2 == s2 + t2) return {1, 0, 0};
    const double lengths = ::sqrt(s2) * ::sqrt(t2);
    return {1 - dot / lengths, float(dot / s2), float(1 / lengths)};
}

template <class S, class T>
void distil_row(
    const distilfast_distillation_args& a, int64_t r, const S* s, const T* t, S* g,
    const Scratch& scratch) {
    const int64_t n_cols = a.n_cols;
    const float weight = a.mask ? a.mask[r] : 1.f;
    const bool wanted = a.divergence != NO_KD || a.cos_weight != 0 || a.mse_weight != 0;
    const bool soft = wanted && weight != 0;
    const bool labelled = a.ce_weight != 0 && a.labels && a.labels[r] != a.ignore_index;
    float kd = 0, ce = 0, cos = 0, mse = 0;
    if (g)
        for (int64_t i = n_cols; i < a.n_padded; i++) narrow(g[i], 0.f);
    const int kind = soft ? int(a.divergence) : NO_KD;
    const double kd_scale = double(a.kd_scale[r * a.kd_scale_stride]) * weight;

    Row row;
    if (kind != NO_KD) {
        row.temperature = float(a.temperature);
        const bool small = a.temperature == 1 || a.temperature == 2 || a.temperature == 3 || a.temperature == 4;
        row.power = small ? int(a.temperature) : 0;
    }
    row.scale = float(LOG2_E / row.temperature);
    if (kind != NO_KD || labelled) find_tops(row, s, t, kind != NO_KD, n_cols);

    const auto sums = [&](auto KD) {
        if (labelled)
            add_up<KD, true>(row, s, t, scratch, n_cols);
        else if (KD != NO_KD)
            add_up<KD, false>(row, s, t, scratch, n_cols);
    };
    switch (kind) {
        case NO_KD: sums(std::integral_constant<int, NO_KD>()); break;
        case FORWARD_KL: sums(std::integral_constant<int, FORWARD_KL>()); break;
        case REVERSE_KL: sums(std::integral_constant<int, REVERSE_KL>()); break;
        case JSD: sums(std::integral_constant<int, JSD>()); break;
    }
    if (kind != NO_KD) {
        // Where neither row holds a NaN only tiny * inf can have made d one, and tiny is not 0.
        if (row.d != row.d && row.l_s == row.l_s && row.l_t == row.l_t) row.d = INFINITY;
        const double by_kd = a.kd_weight * kd_scale * a.temperature;
        double bits = 0;
        if (kind == FORWARD_KL) {
            bits = row.d / row.l_t - ::log2(row.l_t) + ::log2(row.l_s);
            row.by_s = float(by_kd / row.l_s), row.by_t = float(by_kd / row.l_t);
        } else if (kind == REVERSE_KL) {
            bits = row.d / row.l_s - ::log2(row.l_s) + ::log2(row.l_t);
            row.mean = float(row.d / row.l_s);
            row.by_s = float(by_kd * LN_2 / row.l_s);
            row.spoilt = bits < INFINITY ? 0.f : NOT_A_NUMBER;
        } else {
            bits = add_jsd(row, s, t, scratch, n_cols, a.beta);
            row.by_s = bits == bits ? float(by_kd * LN_2 * (1 - a.beta) / row.l_s) : NOT_A_NUMBER;
        }
        kd = float(bits * LN_2 * a.temperature * a.temperature * weight);
    }
    float by_label = 0;
    int64_t label = 0;
    if (labelled) {
        label = a.labels[r];
        const bool known = label >= 0 && label < n_cols;
        if (!known) label = 0;
        const float at_label = widen(s[label]);
        const double x = row.power ? row.temperature * fmaf(at_label, row.scale, -row.top_s)
                                   : fmaf(at_label, float(LOG2_E), -row.top_1);
        ce = known ? float(LN_2 * (::log2(row.l_1) - x)) : NOT_A_NUMBER;
        const double by = known ? a.ce_weight * a.ce_scale[r * a.ce_scale_stride] : NOT_A_NUMBER;
        by_label = float(by);
        row.by_1 = float(by / row.l_1);
    }
    const bool extra = soft && (a.cos_weight != 0 || a.mse_weight != 0);
    if (extra) {
        double squares = 0;
        const Cosine found = add_products(s, t, n_cols, &squares);
        float by_cos = 0, ratio = 0, by_gap = 0;
        if (a.cos_weight != 0) {
            cos = float(found.distance * weight);
            by_cos = float(a.cos_weight * kd_scale * found.by);
            ratio = found.ratio;
        }
        if (a.mse_weight != 0) {
            mse = float(squares * weight);
            by_gap = squares < INFINITY ? float(2 * a.mse_weight * kd_scale) : NOT_A_NUMBER;
        }
        if (g)
            sweep(n_cols, [&](int64_t i, auto n) {
                const Vec u = get(s + i, n, 0.f), w = get(t + i, n, 0.f);
                const Vec x = drop(u, u, w), y = drop(w, u, w);
                const Vec c = fma(x, ratio, y * Vec(-1.f)) * Vec(by_cos);
                store(scratch.extra + i, a.mse_weight != 0 ? fma(x - y, by_gap, c) : c);
            });
    }
    a.rows[r] = kd;
    a.rows[a.n_rows + r] = ce;
    a.rows[2 * a.n_rows + r] = cos;
    a.rows[3 * a.n_rows + r] = mse;
    if (!g) return;
    const auto write = [&](auto KD) {
        if (labelled)
            write_gradient<KD, true>(row, s, t, g, scratch, extra, n_cols, label, by_label);
        else if (KD != NO_KD || extra)
            write_gradient<KD, false>(row, s, t, g, scratch, extra, n_cols, 0, 0.f);
        else
            memset((void*)g, 0, n_cols * sizeof(S));
    };
    switch (kind) {
        case NO_KD: write(std::integral_constant<int, NO_KD>()); break;
        case FORWARD_KL: write(std::integral_constant<int, FORWARD_KL>()); break;
        case REVERSE_KL: write(std::integral_constant<int, REVERSE_KL>()); break;
        case JSD: write(std::integral_constant<int, JSD>()); break;
    }
}

template <class S, class T, class G>
void cosine_row(const distilfast_cosine_args& a, int64_t r, const S* s, const T* t, G* g) {
    const float weight = a.mask ? a.mask[r] : 1.f;
    if (weight == 0) {
        if (g) memset((void*)g, 0, a.n_cols * sizeof(G));
        return;
    }
    const Cosine found = add_products(s, t, a.n_cols, nullptr);
    a.rows[r] += float(found.distance * a.share * weight);
    if (!g) return;
    const Vec by(float(a.scale[r * a.scale_stride] * double(weight) * a.share * found.by));
    sweep(a.n_cols, [&](int64_t i, auto n) {
        const Vec u = get(s + i, n, 0.f), w = get(t + i, n, 0.f);
        const Vec x = drop(u, u, w), y = drop(w, u, w);
        put(g + i, fma(x, found.ratio, y * Vec(-1.f)) * by, n);
    });
}

// Teacher k of an ensemble joins z: the larger so far, and in scratch the sum of 2^(y - z).
template <class T>
void join(const distilfast_ensemble_args& a, int64_t k, const T* t, float* z, float* total) {
    const int64_t n_cols = a.n_cols;
    if (!a.mean) {
        const Vec weight(float(a.weights[k]));
        sweep(n_cols, [&](int64_t i, auto n) {
            const Vec x = get(t + i, n, 0.f) * weight;
            put(z + i, k == 0 ? x : x + get(z + i, n, 0.f), n);
        });
        return;
    }
    Row row;
    row.scale = float(LOG2_E / a.temperature);
    find_tops(row, t, t, false, n_cols);
    Sum l;
    sweep(n_cols, [&](int64_t i, auto n) { l.add(i, exp2(row.x_s(get(t + i, n, -INF)))); });
    const Vec shift(float(::log2(a.weights[k]) - ::log2(l.total())));
    sweep(n_cols, [&](int64_t i, auto n) {
        const Vec y = row.x_s(get(t + i, n, -INF)) + shift;
        if (k == 0) {
            put(z + i, y, n);
            store(total + i, 1.f);
            return;
        }
        const Vec top = get(z + i, n, 0.f), sum = load(total + i);
        const auto more = greater(y, top);
        const Vec apart = select(more, top - y, y - top);
        // Equal ones differ by 0, minus infinity included.
        const Vec e = exp2(select(equal(y, top), 0.f, apart));
        store(total + i, select(more, fma(sum, e, 1.f), sum + e));
        // A NaN is not more: it has to reach z by itself.
        put(z + i, select(more, y, select(equal(y, top), top, top + (y - y))), n);
    });
}

// --- Rows to threads, elements to types ----------------------------------------------------------

template <class F>
void typed(const distilfast_matrix& m, int64_t r, F f) {
    const int64_t at = r * m.stride;
    switch (m.dtype) {
        case DISTILFAST_BF16: f((bf16*)m.data + at); break;
        case DISTILFAST_FP16: f((fp16*)m.data + at); break;
        default: f((float*)m.data + at);
    }
}

// f(s, t) with pointers of the row's types. Of two types the teacher's is widened first: there are
// as many kernels to compile as types, and one more.
template <class F>
void typed_pair(
    const distilfast_matrix& student, const distilfast_matrix& teacher, int64_t r, int64_t n_cols,
    bool needed, float* wide, F f) {
    typed(student, r, [&](auto* s) {
        using S = std::remove_pointer_t<decltype(s)>;
        if (student.dtype == teacher.dtype) {
            f(s, (const S*)teacher.data + r * teacher.stride);
            return;
        }
        if (needed)
            typed(teacher, r, [&](auto* t) {
                sweep(n_cols, [&](int64_t i, auto n) { store(wide + i, get(t + i, n, -INF)); });
            });
        f(s, (const float*)wide);
    });
}

template <class F>
int for_rows(int64_t n_rows, int64_t n_cols, int threads, F f) {
    const int64_t room = (n_cols + 63) / 64 * 64;
    bool failed = false;
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
        float* scratch = (float*)aligned_alloc(64, size_t(room) * 4 * sizeof(float));
        failed = !scratch;
        const Scratch parts = {scratch, scratch + room, scratch + 2 * room, scratch + 3 * room};
        const int64_t chunk = n_rows / (8 * threads) + 1;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t r = 0; r < n_rows; r++)
            if (scratch) f(r, parts);
        free(scratch);
    }
    return failed ? ENOMEM : 0;
}

int distillation(const distilfast_distillation_args& a, int threads) {
    const bool soft = a.divergence != NO_KD || a.cos_weight != 0 || a.mse_weight != 0;
    return for_rows(a.n_rows, a.n_cols, threads, [&](int64_t r, const Scratch& scratch) {
        const bool needed = soft && (!a.mask || a.mask[r] != 0);
        typed_pair(a.student, a.teacher, r, a.n_cols, needed, scratch.teacher, [&](auto* s, auto* t) {
            using S = std::remove_pointer_t<decltype(s)>;
            S* g = a.gradient.data ? (S*)a.gradient.data + r * a.gradient.stride : nullptr;
            distil_row(a, r, s, t, g, scratch);
        });
    });
}

int hidden_cosine(const distilfast_cosine_args& a, int threads) {
    return for_rows(a.n_rows, a.n_cols, threads, [&](int64_t r, const Scratch& scratch) {
        const bool needed = !a.mask || a.mask[r] != 0;
        typed_pair(a.student, a.teacher, r, a.n_cols, needed, scratch.teacher, [&](auto* s, auto* t) {
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

int combine_teachers(const distilfast_ensemble_args& a, int threads) {
    return for_rows(a.n_rows, a.n_cols, threads, [&](int64_t r, const Scratch& scratch) {
        float *z = a.z + r * a.stride_z, *total = scratch.extra;
        for (int64_t k = 0; k < a.n_teachers; k++)
            typed(a.teachers[k], r, [&](auto* t) { join(a, k, t, z, total); });
        if (!a.mean) return;
        const Vec by(float(LN_2 * a.temperature));
        sweep(a.n_cols, [&](int64_t i, auto n) {
            put(z + i, (get(z + i, n, 0.f) + log2(load(total + i))) * by, n);
        });
    });
}

}  // namespace
