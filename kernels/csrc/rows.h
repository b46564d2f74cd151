// What the kernels share: sweeps over a row, sums, the scratch of a thread, rows to threads and
// elements to types.
#pragma once

#include "distilfast.h"
#include "vec.h"

#include <errno.h>
#include <stdlib.h>

#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;
constexpr float TINY = 1.2e-38f;  // about the smallest normal number
constexpr float NOT_A_NUMBER = NAN;
// A row is asked for this many bytes before it is read, the next one too: a row is too short for
// the hardware to notice, and without it a thread waits for memory half of its time.
constexpr int AHEAD = 2048;
// Gradients from here on are written past the caches. They are too large to be found there by
// whoever comes next, and a line that is written whole need not be read first.
constexpr int64_t LARGE_BYTES = int64_t(16) << 20;

// Elements below which a second thread costs more than it brings (PyTorch's own figure).
constexpr int64_t WORTH_A_THREAD = 32768;

template <int K>
using Constant = std::integral_constant<int, K>;
template <class N>
constexpr bool is_whole = !std::is_same_v<N, int>;

// f(i, n, k) for the n <= WIDTH elements from i on, with k counting 0 to 3 and again. Whole vectors
// know n when compiled, and all know k. The first vector has `head` elements, if not 0.
template <class F>
inline void sweep(int64_t n_cols, F f, int64_t head = 0) {
    int64_t i = head < n_cols ? head : n_cols;
    if (i) f(int64_t(0), int(i), Constant<0>());
    for (; i + 4 * WIDTH <= n_cols; i += 4 * WIDTH) {
        f(i, Constant<WIDTH>(), Constant<0>());
        f(i + WIDTH, Constant<WIDTH>(), Constant<1>());
        f(i + 2 * WIDTH, Constant<WIDTH>(), Constant<2>());
        f(i + 3 * WIDTH, Constant<WIDTH>(), Constant<3>());
    }
    for (; i + WIDTH <= n_cols; i += WIDTH) f(i, Constant<WIDTH>(), Constant<1>());
    if (i < n_cols) f(i, int(n_cols - i), Constant<2>());
}
template <class E, class N>
inline Vec get(const E* p, N n, float other) {
    if constexpr (is_whole<N>)
        return load(p);
    else
        return load(p, n, other);
}

// A row of a head's products that is read as what its bias makes of them, where a pointer to the
// row's elements would be, too.
template <class E>
struct Biased {
    const E* p;
    const float* bias;
    Biased operator+(int64_t i) const { return {p + i, bias + i}; }
    float operator[](int64_t i) const { return widen(p[i]) + bias[i]; }
};
template <class E, class N>
inline Vec get(Biased<E> x, N n, float other) {
    return get(x.p, n, other) + get(x.bias, n, 0.f);
}
template <class E>
E element_of(const E*);
template <class E>
E element_of(Biased<E>);
template <class Row>
using Element = decltype(element_of(std::declval<Row>()));

template <class E, class N>
inline void put(E* p, Vec x, N n) {
    if constexpr (is_whole<N>)
        store(p, x);
    else
        store(p, x, n);
}

// Asks for what lies AHEAD of a sweep's k-th vector, once a line of 64 bytes.
template <class E>
inline void prefetch(const E* p, int k) {
    if (k * WIDTH * sizeof(E) % 64 == 0) __builtin_prefetch((const char*)p + AHEAD, 0, 2);
}
template <class E>
inline void prefetch(Biased<E> x, int k) {  // the bias is in L2: every row reads it
    prefetch(x.p, k);
}

// A sum over a row: of a block in fp32, in parts so that additions need not wait for one another, and
// of the blocks in fp64, so that few of them round at the size of the whole.
struct Sum {
    Vec part[4] = {0.f, 0.f, 0.f, 0.f};
    Doubles blocks = {};
    void add(int k, Vec x) { part[k] = part[k] + x; }
    void add(int k, Vec x, Vec y) { part[k] = fma(x, y, part[k]); }
    void end_block() {
        for (Vec& x : part) {
            blocks += __builtin_convertvector(x.v, Doubles);
            x = 0.f;
        }
    }
    double total() const {
        double total = 0;
        for (int i = 0; i < WIDTH; i++) total += blocks[i];
        return total;
    }
};

// A sweep that adds to these sums.
template <class F, class... Sums>
inline void sum_up(int64_t n_cols, F f, Sums&... sums) {
    constexpr int64_t BLOCK = 4096;
    for (int64_t start = 0; start < n_cols; start += BLOCK) {
        const int64_t left = n_cols - start;
        sweep(left < BLOCK ? left : BLOCK, [&](int64_t i, auto n, auto k) { f(start + i, n, k); });
        (sums.end_block(), ...);
    }
}

// The largest element of a row, NaN aside.
struct Top {
    Vec part[4] = {-INF, -INF, -INF, -INF};
    void add(int k, Vec x) { part[k] = max(x, part[k]); }
    float total() const { return highest(max(max(part[0], part[1]), max(part[2], part[3]))); }
};

// The column of the largest element of a row, the first of several, NaN aside.
struct Best {
    Vec value = -INF, from = 0.f;  // of each lane; a column is exact in fp32 up to 2^24
    void add(int64_t i, Vec x) {
        const Mask better = greater(x, value);
        value = select(better, x, value), from = select(better, float(i), from);
    }
    int64_t column() const {
        float values[WIDTH], columns[WIDTH];
        store(values, value), store(columns, from);
        int best = 0;
        for (int j = 0; j < WIDTH; j++) columns[j] += float(j);
        for (int j = 1; j < WIDTH; j++)
            if (values[j] > values[best] || (values[j] == values[best] && columns[j] < columns[best])) best = j;
        return int64_t(columns[best]);
    }
};

// x - y, finite where x is minus infinity: 0 log 0 = 0, as 2^x is 0 there. Where 2^x is not 0 the
// difference is above -127, so the bound changes nothing. The maximum of NaN and a number is that.
inline Vec gap(Vec x, Vec y) { return max(x - y, -1024.f); }

// Columns that both sides rule out have no part in cosine and MSE.
inline Vec drop(Vec x, Vec s, Vec t) { return select(both(equal(s, -INF), equal(t, -INF)), 0.f, x); }

// Sums of s s, t t, s t and, where asked for, (s - t)^2; and what cosine makes of them.
struct Products {
    double distance, squares;
    float ratio, by;  // the gradient of the distance: by (ratio s - t)
};

template <bool SQUARES, class S, class T>
Products add_products(S s, T t, int64_t n_cols) {
    Sum ss, tt, st, sq;
    const auto at = [&](int64_t i, auto n, auto k) {
        prefetch(s + i, k), prefetch(t + i, k);
        const Vec x = get(s + i, n, 0.f), y = get(t + i, n, 0.f);
        const Vec a = drop(x, x, y), b = drop(y, x, y);
        ss.add(k, a, a);
        tt.add(k, b, b);
        st.add(k, a, b);
        if constexpr (SQUARES) sq.add(k, a - b, a - b);
    };
    sum_up(n_cols, at, ss, tt, st, sq);
    const double s2 = ss.total(), t2 = tt.total(), dot = st.total(), squares = sq.total();
    // A zero vector has no direction: distance 1, gradient 0. A NaN is no zero.
    if ((s2 == 0 || t2 == 0) && s2 + t2 == s2 + t2) return {1, squares, 0, 0};
    const double lengths = ::sqrt(s2) * ::sqrt(t2);
    return {1 - dot / lengths, squares, float(dot / s2), float(1 / lengths)};
}

// --- Memory ----------------------------------------------------------------------------------------

// What a call writes is often memory that no one has touched so far, and where the system gives it in
// pages of 4 KiB, asking for each takes several times as long as the kernel. Where it may, let it
// take pages of 2 MiB. Advice, so what comes of it does not matter.
inline void prefer_large_pages(const distilfast_matrix& m, int64_t n_rows) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const int64_t n_bytes = n_rows * m.stride * (m.dtype == DISTILFAST_FP32 ? 4 : 2);
    const uintptr_t begin = (uintptr_t(m.data) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(m.data) + uintptr_t(n_bytes)) / page * page;
    if (m.data && n_bytes >= LARGE_BYTES) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)m, (void)n_rows;
#endif
}

// --- Rows to threads, elements to types ------------------------------------------------------------

// f(p) with a pointer of the row's type.
template <class F>
void typed(const distilfast_matrix& m, int64_t r, F f) {
    const int64_t at = r * m.stride;
    switch (m.dtype) {
        case DISTILFAST_BF16: f((bf16*)m.data + at); break;
        case DISTILFAST_FP16: f((fp16*)m.data + at); break;
        default: f((float*)m.data + at);
    }
}

// f(s, t) with pointers of the rows' types. Where these differ the teacher is fp32, widened first
// if it has to be: there are as many kernels to compile as types, and two more.
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
        if (teacher.dtype == DISTILFAST_FP32) {
            f(s, (const float*)teacher.data + r * teacher.stride);
            return;
        }
        if (needed)
            typed(teacher, r, [&](auto* t) {
                sweep(n_cols, [&](int64_t i, auto n, auto k) {
                    prefetch(t + i, k);
                    store(wide + i, get(t + i, n, -INF));
                });
            });
        f(s, (const float*)wide);
    });
}

// The elements of a buffer for a row: n_cols and two vectors more, in whole lines.
inline int64_t room_for(int64_t n_cols) { return (n_cols + 2 * WIDTH + 15) / 16 * 16; }

inline float* lines(int64_t n_elements) {
    return (float*)aligned_alloc(64, size_t(n_elements) * sizeof(float));
}

// f(r, buffer) for every row, buffer(0) and so on being a thread's own, with room for a row, each
// beginning a line. A row's result does not depend on how many threads there are. A thread takes
// `block` rows at a time, in their order, the first of them a multiple of it; 0: as it sees fit.
template <class F>
int for_rows(int64_t n_rows, int64_t n_cols, int n_buffers, int threads, F f, int64_t block = 0) {
    const int64_t room = room_for(n_cols);
    if (n_rows * n_cols < WORTH_A_THREAD) threads = 1;
    bool failed = false;
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
        float* buffers = nullptr;
        if (n_buffers) {
            buffers = lines(room * n_buffers);
            failed = !buffers;
        }
        // Neighbouring rows, so that what is asked for ahead is the thread's own next row.
        const int64_t chunk = block ? block : n_rows / (8 * threads) + 1;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t r = 0; r < n_rows; r++)
            if (!failed) f(r, [=](int number) { return buffers + room * number; });
        free(buffers);
    }
    return failed ? ENOMEM : 0;
}

}  // namespace
