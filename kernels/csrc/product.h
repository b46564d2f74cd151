// h W^T + b of a fused head: bf16 in, fp32 out. PyTorch's product of bf16 rounds its result to bf16.
//
// A tile of the result, ROWS x PANEL, stays in registers over the whole depth. An instruction
// multiplies 16 pairs of neighbours in depth with one pair of a row and adds both products in fp32:
//
//     tile[i][j] += h[i, 2k] W[j, 2k] + h[i, 2k + 1] W[j, 2k + 1]
//
// For that the weight is packed: of PANEL of its rows the pairs of one k lie side by side. A thread
// packs as many panels as its L2 holds and takes all rows of h over them before it packs the next, so
// that the weight is read from memory once. The result is written past the caches: nobody can find a
// chunk of logits there.
#pragma once

#include "rows.h"

namespace {

#if defined(__AVX512BF16__)

constexpr int ROWS = 8, VECTORS = 3, PANEL = VECTORS * WIDTH;
constexpr int64_t PACKED_BYTES = int64_t(512) << 10;  // half of an L2

inline int64_t pairs_in(int64_t depth) { return (depth + 1) / 2; }

// Columns become rows, of 16 x 16 elements of 32 bits.
inline void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 4)  // within lanes of 128 bits: pairs, then fours
        for (int half = 0; half < 2; half++) {
            const __m512i a = half ? _mm512_unpackhi_epi32(x[i], x[i + 1]) : _mm512_unpacklo_epi32(x[i], x[i + 1]);
            const __m512i b =
                half ? _mm512_unpackhi_epi32(x[i + 2], x[i + 3]) : _mm512_unpacklo_epi32(x[i + 2], x[i + 3]);
            y[i + 2 * half] = _mm512_unpacklo_epi64(a, b);
            y[i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    // y[4 q + c] holds, in its lane l, column 4 l + c of the rows 4 q to 4 q + 3.
    for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(y[c], y[4 + c], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(y[c], y[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(y[8 + c], y[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(y[8 + c], y[12 + c], 0xdd);
        x[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        x[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        x[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        x[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

// The first n <= 16 rows of a weight, as 16 of the columns of a panel; zeros for what is not there.
inline void pack(const bf16* weight, int64_t stride, int n, int64_t depth, uint32_t* panel) {
    for (int64_t k = 0; k < depth; k += 32) {
        const int64_t left = depth - k;
        const __mmask32 some = left < 32 ? __mmask32((uint64_t(1) << left) - 1) : ~__mmask32(0);
        __m512i x[16];
        for (int i = 0; i < 16; i++)
            x[i] = i < n ? _mm512_maskz_loadu_epi16(some, weight + i * stride + k) : _mm512_setzero_si512();
        transpose(x);
        const int64_t pairs = pairs_in(left < 32 ? left : 32);
        for (int64_t i = 0; i < pairs; i++) _mm512_storeu_si512(panel + (k / 2 + i) * PANEL, x[i]);
    }
}

// Where a tile of the result goes, and how many of its columns exist.
struct Place {
    float* product;
    int64_t stride;
    int n_cols;
    bool streamed;
};

template <int N>
inline void multiply_tile(
    const bf16* hidden, int64_t stride, const uint32_t* panel, int64_t depth, const float* bias, Place to) {
    __m512 tile[N][VECTORS];
#pragma GCC unroll 3
    for (int j = 0; j < VECTORS; j++) {
        const int left = to.n_cols - j * WIDTH;
        const Vec begin =
            !bias || left <= 0 ? Vec(0.f) : load(bias + j * WIDTH, left < WIDTH ? left : WIDTH, 0.f);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) tile[i][j] = begin.v;
    }
    const auto add = [&](int64_t k, auto pair_of) {
        __m512bh columns[VECTORS];
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; j++)
            columns[j] = (__m512bh)_mm512_load_si512(panel + k * PANEL + j * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(pair_of(hidden + i * stride + 2 * k));
#pragma GCC unroll 3
            for (int j = 0; j < VECTORS; j++) tile[i][j] = _mm512_dpbf16_ps(tile[i][j], columns[j], pair);
        }
    };
    const auto whole = [](const bf16* p) {
        int pair;
        memcpy(&pair, p, sizeof pair);
        return pair;
    };
    for (int64_t k = 0; k < depth / 2; k++) add(k, whole);
    if (depth % 2) add(depth / 2, [](const bf16* p) { return int(p->bits); });
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; j++) {
            float* const at = to.product + i * to.stride + j * WIDTH;
            const int left = to.n_cols - j * WIDTH;
            if (left >= WIDTH)
                to.streamed ? stream(at, tile[i][j]) : store(at, tile[i][j]);
            else if (left > 0)
                store(at, tile[i][j], left);
        }
}

// The first n <= N rows.
template <int N>
inline void multiply_rows(
    int n, const bf16* hidden, int64_t stride, const uint32_t* panel, int64_t depth, const float* bias,
    Place to) {
    if (n >= N)
        multiply_tile<N>(hidden, stride, panel, depth, bias, to);
    else if constexpr (N > 1)
        multiply_rows<N - 1>(n, hidden, stride, panel, depth, bias, to);
}

int product(const distilfast_product_args& a, int threads) {
    const int64_t panel_size = PANEL * pairs_in(a.depth);
    const int64_t fitting = PACKED_BYTES / (panel_size * int64_t(sizeof(uint32_t)));
    const int64_t panels = (a.n_cols + PANEL - 1) / PANEL, most = (panels + threads - 1) / threads;
    const int64_t at_once = fitting < 1 ? 1 : fitting > most ? most : fitting;
    const bool streamed = uintptr_t(a.product) % 64 == 0 && a.stride_product % WIDTH == 0 &&
                          a.n_rows * a.stride_product * int64_t(sizeof(float)) >= LARGE_BYTES;
    bool failed = false;
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
        uint32_t* const packed = (uint32_t*)lines(at_once * panel_size);
        failed = !packed;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < panels; first += at_once) {
            if (failed) continue;
            const int64_t here = panels - first < at_once ? panels - first : at_once;
            for (int64_t p = 0; p < here; p++)
                for (int j = 0; j < PANEL; j += 16) {
                    const int64_t column = (first + p) * PANEL + j, left = a.n_cols - column;
                    const bf16* const rows = (const bf16*)a.weight.data + column * a.weight.stride;
                    const int n = left < 0 ? 0 : left < 16 ? int(left) : 16;
                    pack(rows, a.weight.stride, n, a.depth, packed + p * panel_size + j);
                }
            for (int64_t r = 0; r < a.n_rows; r += ROWS) {
                const int n = a.n_rows - r < ROWS ? int(a.n_rows - r) : ROWS;
                const bf16* const hidden = (const bf16*)a.hidden.data + r * a.hidden.stride;
                for (int64_t p = 0; p < here; p++) {
                    const int64_t column = (first + p) * PANEL, left = a.n_cols - column;
                    const Place to = {
                        a.product + r * a.stride_product + column, a.stride_product,
                        left < PANEL ? int(left) : PANEL, streamed};
                    multiply_rows<ROWS>(
                        n, hidden, a.hidden.stride, packed + p * panel_size, a.depth,
                        a.bias ? a.bias + column : nullptr, to);
                }
            }
        }
        free(packed);
        if (streamed) end_streaming();
    }
    return failed ? ENOMEM : 0;
}

#else

int product(const distilfast_product_args&, int) { return ENOSYS; }

#endif

}  // namespace
