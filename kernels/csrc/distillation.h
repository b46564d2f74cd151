// The losses over the vocabulary and their gradient, a row a thread.
//
// Mathematics: that of kernels/distilfast_kernels/distillation.py. With x = (s - m) log2(e) / T, in
// bits, e = 2^x and l = sum e; m is any number that keeps e in fp32's range, and falls out:
//
//     KL(t || s) = sum e_t (x_t - x_s) / l_t - log2 l_t + log2 l_s    in bits
//     d/ds       = (e_s / l_s - e_t / l_t) / T
//
// and CE's e at T = 1 is e_s^T where T is 1, 2, 3 or 4.
//
// A row pair is read from memory once, and its exponentials are computed once. They stay, in fp32,
// in a scratch of the thread's own that fits L2:
//
//     1. exponentials and sums   reads s, t      writes e_s, e_t
//        (JSD: the distances from the mixture, over e_t)
//     2. the gradient            reads e_s, e_t  writes g
//
// No sweep looks for the maximum: m is that of the row's first columns. It is as good unless the true
// maximum lies far above it, where x and with it e lose digits. The sums say so, as they are not below
// their largest term; then sweep 1 is done again with the true maximum.
//
// A divergence that is small is the difference of large sums, of which little is left. Such a row
// takes a sweep more, with no negative term in it. With d = log q - log p, p of the teacher, q of the
// student, and since the sums of p and q are both 1,
//
//     KL(p || q) = sum p phi(d)             phi(x) = e^x - 1 - x
//     KL(q || p) = sum q phi(-d)
//     KL(p || m) = sum p psi(m / p - 1)     psi(x) = x - log(1 + x), and so is KL(q || m)
//
// each by a series where |d| is small and as it stands where it is not. d comes from s - t, which is
// exact there; an error of its constant counts only squared. The gradient, too, is taken from d.
#pragma once

#include "rows.h"

namespace {

enum {
    NO_KD = DISTILFAST_NO_KD,
    FORWARD_KL = DISTILFAST_FORWARD_KL,
    REVERSE_KL = DISTILFAST_REVERSE_KL,
    JSD = DISTILFAST_JSD
};

// Of the vocabularies in use the first 2,048 columns hold frequent tokens. Up to 2^20 x errs by 2^-20
// at most, and a row of a million equal columns is no exception.
constexpr int64_t FIRST_COLUMNS = 2048;
constexpr double RANGE = 0x1p20;
// In bits: below it a divergence is computed without differences of large sums.
constexpr double SMALL = 0x1p-6;

// A thread's own, with room for a row each.
struct Scratch {
    float *e_s, *e_t, *extra;
    float* bias_gradient;  // of the rows of a block, to be added to; or null
};

// The gradients of a bias are summed in so many blocks of rows, whatever the number of threads.
constexpr int64_t BLOCKS = 64;

// tanh y = 1 - 2 / (1 + e^2y), and where that cancels its series.
inline Vec tanh(Vec y) {
    const Vec y2 = y * y;
    Vec p = fma(y2, 2.1869488e-2f, -5.3968254e-2f);
    p = fma(p, y2, 1.3333334e-1f);
    p = fma(p, y2, -3.3333334e-1f);
    const Vec near = fma(p * y2, y, y), far = Vec(1.f) - Vec(2.f) / (exp2(y * Vec(2 * LOG2_E)) + Vec(1.f));
    return select(greater(y2, 0.0625f), far, near);
}

// What makes logits of a head's products.
struct Head {
    float scale, softcap, inverse;
    const float* bias;
    explicit Head(const distilfast_head& head)
        : scale(float(head.scale)), softcap(float(head.softcap)), inverse(1 / softcap), bias(head.bias) {}
    bool linear() const { return scale == 1 && softcap == 0; }
    bool plain() const { return linear() && !bias; }
    Vec logits(Vec x) const {
        return softcap != 0 ? tanh(x * scale * Vec(inverse)) * softcap : x * scale;
    }
    // Their derivative, from themselves.
    Vec slope(Vec y) const {
        const Vec cosine = softcap != 0 ? y * inverse : Vec(0.f);
        return fma(cosine, Vec(0.f) - cosine, 1.f) * scale;
    }
};

// 2^(above scale) with the digits that logits of type E call for.
template <class E>
inline Vec exponential(Vec above, Vec scale) {
    const Vec x = above * scale;
    if constexpr (sizeof(E) < sizeof(float)) return exp2(x);
    return exp2(x, above, scale);
}

// e^power for 1, 2, 3, 4.
inline Vec power_of(Vec e, int power) {
    const Vec square = power > 1 ? e * e : e;
    return power == 4 ? square * square : power == 3 ? square * e : square;
}

// What a row comes to.
struct Row {
    float scale = 0, top_s = 0, top_t = 0;
    int power = 1;  // T where e_1 = 2^(T x_s) is a small power of e_s; else 0
    double l_s = 0, l_t = 0, d = 0, l_1 = 0;
    bool small = false;  // the divergence: then scratch.e_t holds what the gradient is made of
    float to_d = 0;  // 1 / T
    // the gradient's factors
    float by_s = 0, keep = 1, ratio = 0, mean = 0, spoilt = 0, by_1 = 0;

    Vec x_s(Vec s) const { return (s - top_s) * scale; }
    Vec x_t(Vec t) const { return (t - top_t) * scale; }
    template <class S>
    Vec e_1(Vec e_s, Vec s) const {
        if (power) return power_of(e_s, power);
        return exponential<S>(s - top_s, float(LOG2_E));
    }
    // l_1 of a higher power says the same as l_s, in a range of its own.
    bool in_range() const { return l_s <= RANGE && l_t <= RANGE && (power > 1 || l_1 <= RANGE); }
};

template <class S, class T>
void find_tops(Row& row, S s, T t, bool kd, int64_t n_cols) {
    Top top_s, top_t;
    sweep(n_cols, [&](int64_t i, auto n, auto k) {
        top_s.add(k, get(s + i, n, -INF));
        if (kd) top_t.add(k, get(t + i, n, -INF));
    });
    row.top_s = top_s.total(), row.top_t = top_t.total();
}

template <int KD, bool CE, class S, class T>
void add_up(Row& row, S s, T t, const Scratch& scratch, int64_t n_cols) {
    Sum l_s, l_t, d, l_1;
    const auto at = [&](int64_t i, auto n, auto k) {
        prefetch(s + i, k);
        const Vec logit_s = get(s + i, n, -INF), x_s = row.x_s(logit_s);
        const Vec e_s = exponential<Element<S>>(logit_s - row.top_s, row.scale);
        store(scratch.e_s + i, e_s);
        if constexpr (KD != NO_KD) {
            prefetch(t + i, k);
            const Vec logit_t = get(t + i, n, -INF), x_t = row.x_t(logit_t);
            const Vec e_t = exponential<Element<S>>(logit_t - row.top_t, row.scale);
            store(scratch.e_t + i, e_t);
            l_s.add(k, e_s);
            l_t.add(k, e_t);
            if constexpr (KD == FORWARD_KL) d.add(k, e_t, gap(x_t, x_s));
            if constexpr (KD == REVERSE_KL) d.add(k, e_s, gap(x_s, x_t));
        }
        if constexpr (CE) l_1.add(k, row.template e_1<Element<S>>(e_s, logit_s));
    };
    sum_up(n_cols, at, l_s, l_t, d, l_1);
    row.l_s = l_s.total(), row.l_t = l_t.total(), row.d = d.total(), row.l_1 = l_1.total();
}

// JSD: against M = beta p_t + (1 - beta) p_s, times l_s. Leaves log2(p_s / M) over e_t.
template <class S, class T>
double add_jsd(Row& row, S s, T t, const Scratch& scratch, int64_t n_cols, double beta) {
    const float share_s = float(1 - beta), share_t = float(beta * row.l_s / row.l_t);
    Sum a, b;
    const auto at = [&](int64_t i, auto n, auto k) {
        const Vec e_s = load(scratch.e_s + i), e_t = load(scratch.e_t + i);
        const Vec mixture = log2(max(fma(e_s, share_s, e_t * Vec(share_t)), TINY));
        const Vec from_m = gap(row.x_s(get(s + i, n, -INF)), mixture);
        a.add(k, e_t, gap(row.x_t(get(t + i, n, -INF)), mixture));
        b.add(k, e_s, from_m);
        store(scratch.e_t + i, from_m);
    };
    sum_up(n_cols, at, a, b);
    const double kl_s = b.total() / row.l_s;
    row.mean = float(kl_s);
    return beta * (a.total() / row.l_t + ::log2(row.l_s / row.l_t)) + (1 - beta) * kl_s;
}

// Up to |x| = NEAR the series of phi and psi err by 2e-6 of their value; beyond, the differences do.
constexpr float NEAR = 0.125f;

inline Vec phi(Vec x) {  // e^x - 1 - x
    Vec p = fma(x, 1.3888889e-3f, 8.3333333e-3f);
    p = fma(p, x, 4.1666667e-2f);
    p = fma(p, x, 1.6666667e-1f);
    p = fma(p, x, 5e-1f);
    return p * x * x;
}
inline Vec psi(Vec x) {  // x - log(1 + x)
    Vec p = fma(x, 1.25e-1f, -1.4285714e-1f);
    p = fma(p, x, 1.6666667e-1f);
    p = fma(p, x, -2e-1f);
    p = fma(p, x, 2.5e-1f);
    p = fma(p, x, -3.3333333e-1f);
    p = fma(p, x, 5e-1f);
    return p * x * x;
}

// The divergence in bits, where it is small, and over e_t what its gradient is made of. By the ratio
// l_s / l_t everything is in units of 1 / l_s; e_t is 0 where d is infinite or none.
template <int KD, class S, class T>
double add_small(Row& row, S s, T t, const Scratch& scratch, int64_t n_cols, double beta) {
    const float ratio = float(row.l_s / row.l_t), share_s = float(1 - beta), share_t = float(beta);
    // d = (s - t - offset) / T - rest: what is subtracted first is large, and cancels exactly.
    const double tops = double(row.top_s) - row.top_t;
    const float offset = float(tops), rest = float(::log(row.l_s / row.l_t) + (tops - offset) * row.to_d);
    Sum a, b, left;
    const auto at = [&](int64_t i, auto n, auto k) {
        const Vec e_s = load(scratch.e_s + i), logit_t = get(t + i, n, -INF);
        const Vec e_t = (KD == JSD ? exponential<Element<S>>(logit_t - row.top_t, row.scale)
                                   : load(scratch.e_t + i)) * Vec(ratio);  // JSD's is overwritten
        const Vec apart = fma(get(s + i, n, -INF) - logit_t - Vec(offset), row.to_d, -rest);
        const Vec d = min(max(apart, -1024.f), 1024.f);
        const Mask near = greater(NEAR * NEAR, d * d);
        const Vec rises = d + phi(d);  // q / p - 1
        const Vec differ = select(near, e_t * rises, e_s - e_t);
        left.add(k, differ);
        if constexpr (KD == FORWARD_KL) {
            a.add(k, select(near, e_t * phi(d), e_s - e_t - e_t * d));
            store(scratch.e_t + i, differ);
        }
        if constexpr (KD == REVERSE_KL) {
            a.add(k, select(near, e_s * phi(Vec(0.f) - d), fma(e_s, d, e_t - e_s)));
            store(scratch.e_t + i, d * Vec(float(LOG2_E)));
        }
        if constexpr (KD == JSD) {
            const Vec w = (phi(Vec(0.f) - d) - d) * share_t;  // m / q - 1
            const Vec from_t = psi(rises * share_s), from_s = psi(w);
            Vec kl_t = e_t * from_t, kl_s = e_s * from_s, from_m = from_s - w;
            if (!all(near)) {  // which is rare, and dear
                const Vec mixture = fma(e_s, share_s, e_t * Vec(share_t));
                const Vec log_m = log2(max(mixture, TINY)) * Vec(float(LN_2));
                const Vec far_s = log2(max(e_s, TINY)) * Vec(float(LN_2)) - log_m;
                const Vec far_t = log2(max(e_t, TINY)) * Vec(float(LN_2)) - log_m;
                kl_t = select(near, kl_t, fma(e_t, far_t, mixture - e_t));
                kl_s = select(near, kl_s, fma(e_s, far_s, mixture - e_s));
                from_m = select(near, from_m, far_s);
            }
            a.add(k, kl_t);
            b.add(k, kl_s);
            store(scratch.e_t + i, from_m * Vec(float(LOG2_E)));
        }
    };
    sum_up(n_cols, at, a, b, left);
    row.small = true;
    // What is left of the sum of q - p, which is 0, is what the constant in d is off.
    const double off = left.total() / row.l_s;
    if constexpr (KD == FORWARD_KL) row.keep = float(-off), row.ratio = -1;
    if constexpr (KD == JSD) {
        row.mean = float(LOG2_E * (b.total() / row.l_s + beta * off));
        return LOG2_E * (beta * a.total() + (1 - beta) * b.total()) / row.l_s;
    }
    row.mean = float(LOG2_E * (a.total() / row.l_s + off));
    return LOG2_E * a.total() / row.l_s;
}

// Entropies of the softmaxes at T, in nats, and whether the largest logits stand in the same column.
template <class S, class T>
void add_statistics(
    const distilfast_distillation_args& a, int64_t r, const Row& row, S s, T t, const Scratch& scratch) {
    Sum h_s, h_t;
    Best best_s, best_t;
    const auto at = [&](int64_t i, auto n, auto k) {
        const Vec logit_s = get(s + i, n, -INF), logit_t = get(t + i, n, -INF);
        h_s.add(k, load(scratch.e_s + i), gap(row.x_s(logit_s), 0.f));
        h_t.add(k, load(scratch.e_t + i), gap(row.x_t(logit_t), 0.f));
        best_s.add(i, logit_s), best_t.add(i, logit_t);
    };
    sum_up(a.n_cols, at, h_s, h_t);
    float* const out = a.statistics + r;
    out[0] = float(LN_2 * (::log2(row.l_s) - h_s.total() / row.l_s));
    out[a.n_rows] = float(LN_2 * (::log2(row.l_t) - h_t.total() / row.l_t));
    const bool known = row.l_s == row.l_s && row.l_t == row.l_t;
    out[2 * a.n_rows] = !known ? NOT_A_NUMBER : best_s.column() == best_t.column() ? 1.f : 0.f;
}

// Cosine and MSE, whose gradient waits in scratch.extra: their part of the losses and of a.rows.
template <class S, class T>
void add_cosine_and_mse(
    const distilfast_distillation_args& a, int64_t r, S s, T t, const Scratch& scratch,
    double weight, double scale) {
    const Products found = add_products<true>(s, t, a.n_cols);
    float by_cos = 0, ratio = 0, by_gap = 0;
    if (a.cos_weight != 0) {
        a.rows[2 * a.n_rows + r] = float(found.distance * weight);
        by_cos = float(a.cos_weight * scale * found.by);
        ratio = found.ratio;
    }
    if (a.mse_weight != 0) {
        a.rows[3 * a.n_rows + r] = float(found.squares * weight);
        by_gap = found.squares < INFINITY ? float(2 * a.mse_weight * scale) : NOT_A_NUMBER;
    }
    if (!a.gradient.data) return;
    const auto at = [&](int64_t i, auto n, auto) {
        const Vec u = get(s + i, n, 0.f), w = get(t + i, n, 0.f);
        const Vec x = drop(u, u, w), y = drop(w, u, w);
        const Vec c = fma(x, ratio, Vec(0.f) - y) * Vec(by_cos);
        store(scratch.extra + i, a.mse_weight != 0 ? fma(x - y, by_gap, c) : c);
    };
    sweep(a.n_cols, at);
}

template <int KD, bool CE, class S, class T, class N>
inline Vec gradient_at(
    const Row& row, S s, T t, const Scratch& scratch, bool extra, int64_t i, N n) {
    Vec g(0.f);
    if constexpr (KD == FORWARD_KL)
        g = fma(load(scratch.e_t + i), -row.ratio, load(scratch.e_s + i) * Vec(row.keep)) * Vec(row.by_s);
    if constexpr (KD == REVERSE_KL) {
        const Vec apart = row.small
                              ? load(scratch.e_t + i)
                              : gap(row.x_s(get(s + i, n, -INF)), row.x_t(get(t + i, n, -INF)));
        g = fma(load(scratch.e_s + i) * (apart - Vec(row.mean)), row.by_s, row.spoilt);
    }
    if constexpr (KD == JSD)
        g = load(scratch.e_s + i) * (load(scratch.e_t + i) - Vec(row.mean)) * Vec(row.by_s);
    if constexpr (CE)
        g = fma(row.template e_1<Element<S>>(load(scratch.e_s + i), get(s + i, n, -INF)), row.by_1, g);
    if (extra) g = g + load(scratch.extra + i);
    return g;
}

template <int KD, bool CE, class S, class T, class G>
void write_gradient(
    const Row& row, const Head& head, S s, T t, G* g, const Scratch& scratch, bool extra,
    bool streamed, int64_t n_cols, int64_t label, double by) {
    float* const sums = scratch.bias_gradient;
    float at_label = 0;  // before the row is overwritten, if g is s
    const float sum_at_label = sums ? sums[label] : 0;
    if constexpr (CE) {
        // p - 1 from their difference: it is what is left to learn once p is nearly 1.
        const Vec e_s = load(scratch.e_s + label), e_1 = row.template e_1<Element<S>>(e_s, widen(s[label]));
        const double ce = by * (first(e_1) - row.l_1) / row.l_1;
        at_label = float(ce + first(gradient_at<KD, false>(row, s, t, scratch, extra, label, 1)));
        if (!head.linear()) at_label *= first(head.slope(widen(s[label])));
    }
    const auto write = [&](auto of_a_head) {
        return [&](int64_t i, auto n, auto) {
            Vec x = gradient_at<KD, CE>(row, s, t, scratch, extra, i, n);
            if constexpr (of_a_head) {
                if (!head.linear()) x = x * head.slope(get(s + i, n, 0.f));
                if (sums) put(sums + i, get(sums + i, n, 0.f) + x, n);
            }
            if (is_whole<decltype(n)> && streamed)
                stream(g + i, x);
            else
                put(g + i, x, n);
        };
    };
    // Vectors at multiples of their size in memory, which streaming needs.
    const int64_t past = int64_t(uintptr_t(g) / sizeof(G) % WIDTH);
    const int64_t first_ones = past && streamed ? WIDTH - past : 0;
    if (sums || !head.linear())
        sweep(n_cols, write(std::true_type()), first_ones);
    else
        sweep(n_cols, write(std::false_type()), first_ones);
    if (streamed) end_streaming();
    if constexpr (CE) {
        narrow(g[label], at_label);
        if (sums) sums[label] = sum_at_label + at_label;
    }
}

// f with the kind of KD and whether there is CE, as constants.
template <class F>
void dispatched(int kind, bool labelled, F f) {
    const auto with = [&](auto kd) {
        if (labelled)
            f(kd, std::true_type());
        else
            f(kd, std::false_type());
    };
    switch (kind) {
        case FORWARD_KL: with(Constant<FORWARD_KL>()); break;
        case REVERSE_KL: with(Constant<REVERSE_KL>()); break;
        case JSD: with(Constant<JSD>()); break;
        default: with(Constant<NO_KD>());
    }
}

// What the row's kd, cos and mse count: 0 outside the mask, and where their scale is 0.
double weight_of(const distilfast_distillation_args& a, int64_t r) {
    if (a.kd_scale[r * a.kd_scale_stride] == 0) return 0;
    return a.mask ? a.mask[r] : 1;
}

template <class S, class T, class G>
void distil_row(
    const distilfast_distillation_args& a, int64_t r, S s, T t, G* g,
    const Scratch& scratch) {
    const int64_t n_cols = a.n_cols;
    const double weight = weight_of(a, r);
    const double kd_scale = a.kd_scale[r * a.kd_scale_stride] * weight;
    const int kind = weight != 0 ? int(a.divergence) : NO_KD;
    const bool extra = weight != 0 && (a.cos_weight != 0 || a.mse_weight != 0);
    const float ce_scale = a.ce_scale[r * a.ce_scale_stride];
    const bool labelled =
        a.ce_weight != 0 && a.labels && a.labels[r] != a.ignore_index && ce_scale != 0;
    for (int part = 0; part < 4; part++) a.rows[part * a.n_rows + r] = 0;
    for (int i = 0; a.statistics && i < 3; i++) a.statistics[i * a.n_rows + r] = 0;

    Row row;
    const double temperature = kind == NO_KD ? 1 : a.temperature;
    row.scale = float(LOG2_E / temperature), row.to_d = float(1 / temperature);
    row.power = 0;
    for (int whole = 1; whole <= 4; whole++)
        if (temperature == whole) row.power = whole;
    if (kind != NO_KD || labelled) {
        const auto sums = [&](int64_t n_seen) {
            find_tops(row, s, t, kind != NO_KD, n_seen);
            dispatched(kind, labelled, [&](auto kd, auto ce) {
                add_up<kd, ce>(row, s, t, scratch, n_cols);
            });
        };
        sums(n_cols < FIRST_COLUMNS ? n_cols : FIRST_COLUMNS);
        if (n_cols > FIRST_COLUMNS && !row.in_range()) sums(n_cols);
    }
    if (kind != NO_KD) {
        if (a.statistics) add_statistics(a, r, row, s, t, scratch);
        // Where neither row holds a NaN only tiny * inf can have made d one, and tiny is not 0.
        if (row.d != row.d && row.l_s == row.l_s && row.l_t == row.l_t) row.d = INFINITY;
        const double by_kd = a.kd_weight * kd_scale * a.temperature;
        double bits = 0;
        if (kind == FORWARD_KL) {
            bits = row.d / row.l_t - ::log2(row.l_t) + ::log2(row.l_s);
            row.by_s = float(by_kd / row.l_s), row.ratio = float(row.l_s / row.l_t);
            if (bits < SMALL) bits = add_small<FORWARD_KL>(row, s, t, scratch, n_cols, 0);
        } else if (kind == REVERSE_KL) {
            bits = row.d / row.l_s - ::log2(row.l_s) + ::log2(row.l_t);
            row.mean = float(row.d / row.l_s);
            row.by_s = float(by_kd * LN_2 / row.l_s);
            row.spoilt = bits < INFINITY ? 0.f : NOT_A_NUMBER;
            if (bits < SMALL) bits = add_small<REVERSE_KL>(row, s, t, scratch, n_cols, 0);
        } else {
            bits = add_jsd(row, s, t, scratch, n_cols, a.beta);
            if (bits < SMALL) bits = add_small<JSD>(row, s, t, scratch, n_cols, a.beta);
            row.by_s = bits == bits ? float(by_kd * LN_2 * (1 - a.beta) / row.l_s) : NOT_A_NUMBER;
        }
        a.rows[r] = float(bits * LN_2 * a.temperature * a.temperature * weight);
    }
    double by_ce = 0;
    int64_t label = 0;
    if (labelled) {
        label = a.labels[r];
        const bool known = label >= 0 && label < n_cols;
        if (!known) label = 0;
        const double above = double(widen(s[label])) - row.top_s;
        a.rows[a.n_rows + r] = known ? float(LN_2 * ::log2(row.l_1) - above) : NOT_A_NUMBER;
        by_ce = known ? a.ce_weight * ce_scale : NOT_A_NUMBER;
        row.by_1 = float(by_ce / row.l_1);
    }
    if (extra) add_cosine_and_mse(a, r, s, t, scratch, weight, kd_scale);
    if (!g) return;
    if (kind == NO_KD && !labelled && !extra) {
        memset((void*)g, 0, a.n_padded * sizeof(G));
        return;
    }
    // In place the lines are in the cache: they have just been read.
    const bool streamed = a.gradient.data != a.student.data &&
                          a.n_rows * a.gradient.stride * int64_t(sizeof(G)) >= LARGE_BYTES;
    const Head head(a.student_head);
    dispatched(kind, labelled, [&](auto kd, auto ce) {
        write_gradient<kd, ce>(row, head, s, t, g, scratch, extra, streamed, n_cols, label, by_ce);
    });
    // Last, as it may lie over logits that had to be read.
    for (int64_t i = n_cols; i < a.n_padded; i++) narrow(g[i], 0.f);
}

// The logits of a row in fp32.
void widen_row(const distilfast_matrix& m, int64_t r, int64_t n_cols, const Head& head, float* wide) {
    typed(m, r, [&](auto* x) {
        sweep(n_cols, [&](int64_t i, auto n, auto k) {
            prefetch(x + i, k);
            const Vec product = get(x + i, n, 0.f);
            store(wide + i, head.logits(head.bias ? product + get(head.bias + i, n, 0.f) : product));
        });
    });
}

// Adds the sums of the blocks, in their order.
void add_blocks(float* to, const float* sums, int64_t n_blocks, int64_t n_cols, int threads) {
    constexpr int64_t PART = 1024;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t start = 0; start < n_cols; start += PART)
        sweep(n_cols - start < PART ? n_cols - start : PART, [&](int64_t i, auto n, auto) {
            Vec sum = 0.f;
            for (int64_t b = 0; b < n_blocks; b++)
                sum = sum + load(sums + b * room_for(n_cols) + start + i);
            put(to + start + i, get(to + start + i, n, 0.f) + sum, n);
        });
}

int distillation(const distilfast_distillation_args& a, int threads) {
    const Head student_head(a.student_head), teacher_head(a.teacher_head);
    const bool plain = student_head.plain() && teacher_head.plain();
    // A row is made into logits first, in scratch, but for the common case, where that happens on
    // the way: both heads have a bias and nothing else, and products in fp32.
    const bool biased = student_head.linear() && teacher_head.linear() && student_head.bias &&
                        teacher_head.bias && a.student.dtype == DISTILFAST_FP32 &&
                        a.teacher.dtype == DISTILFAST_FP32;
    const bool extra = a.cos_weight != 0 || a.mse_weight != 0;
    const bool soft = extra || a.divergence != NO_KD;
    const int n_wide = biased ? 0 : plain ? a.student.dtype != a.teacher.dtype : 2;
    if (a.gradient.data != a.student.data) prefer_large_pages(a.gradient, a.n_rows);
    const int64_t room = room_for(a.n_cols), block = (a.n_rows + BLOCKS - 1) / BLOCKS;
    const bool summed = a.bias_gradient && a.gradient.data && a.n_rows;
    const int64_t n_blocks = summed ? (a.n_rows + block - 1) / block : 0;
    float* const sums = summed ? lines(room * n_blocks) : nullptr;
    if (summed && !sums) return ENOMEM;

    const auto at_row = [&](int64_t r, auto buffer) {
        const bool needed = soft && weight_of(a, r) != 0;
        Scratch scratch = {buffer(0), buffer(1), extra ? buffer(2) : nullptr, nullptr};
        if (summed) {
            scratch.bias_gradient = sums + r / block * room;
            if (r % block == 0) memset(scratch.bias_gradient, 0, size_t(room) * sizeof(float));
        }
        float* const wide = n_wide ? buffer(2 + extra) : nullptr;
        const auto distil = [&](auto s, auto t, auto* g) {
            distil_row(a, r, s, t, a.gradient.data ? g : nullptr, scratch);
        };
        if (plain) {
            typed_pair(a.student, a.teacher, r, a.n_cols, needed, wide, [&](const auto* s, const auto* t) {
                using E = std::remove_const_t<std::remove_pointer_t<decltype(s)>>;
                if constexpr (std::is_same_v<E, float>)
                    typed(a.gradient, r, [&](auto* g) { distil(s, t, g); });
                else
                    distil(s, t, (E*)a.gradient.data + r * a.gradient.stride);
            });
            return;
        }
        if (biased) {
            const Biased<float> s = {(const float*)a.student.data + r * a.student.stride, student_head.bias};
            const Biased<float> t = {(const float*)a.teacher.data + r * a.teacher.stride, teacher_head.bias};
            typed(a.gradient, r, [&](auto* g) { distil(s, t, g); });
            return;
        }
        float* const wide_t = buffer(3 + extra);
        widen_row(a.student, r, a.n_cols, student_head, wide);
        if (needed) widen_row(a.teacher, r, a.n_cols, teacher_head, wide_t);
        typed(a.gradient, r, [&](auto* g) { distil((const float*)wide, (const float*)wide_t, g); });
    };
    const int failed = for_rows(
        a.n_rows, a.n_cols, 2 + extra + n_wide, threads, at_row, summed ? block : 0);
    if (summed && !failed) add_blocks(a.bias_gradient, sums, n_blocks, a.n_cols, threads);
    free(sums);
    return failed;
}

}  // namespace
