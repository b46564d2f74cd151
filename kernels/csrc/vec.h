// A vector of fp32 for the instruction set that a file is compiled for, and loads and stores that
// convert. Where n is given, only the first n < WIDTH elements are touched.
//
// max and min of a NaN and a number are their second argument, whichever it is: callers rely on it.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float INF = INFINITY;

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof x);
    return bits;
}

// One element, for the label's column and for machines without vectors.
inline float widen(float x) { return x; }
inline float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude << 13));
    return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}
inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {
    const uint32_t bits = as_bits(x);
    if (x != x) {
        to.bits = uint16_t(bits >> 16 | 0x40);
    } else {
        to.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
inline void narrow(fp16& to, float x) {
    const uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        to.bits = uint16_t(sign | 0x7e00);
    } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
        to.bits = uint16_t(sign | 0x7c00);
    } else if (magnitude < 0x38800000) {  // subnormal: the addition rounds at 2^-24
        to.bits = uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
    } else {
        to.bits = uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
    }
}

#if defined(__AVX512F__)

constexpr int WIDTH = 16;
struct Vec {
    __m512 v;
    Vec() = default;
    Vec(__m512 x) : v(x) {}
    Vec(float x) : v(_mm512_set1_ps(x)) {}
};
using Mask = __mmask16;

inline Mask first(int n) { return Mask((1u << n) - 1); }
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no.v, yes.v); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float highest(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load(const bf16* p) { return widen16(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const float* p, int n, float other) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(other), first(n), p);
}
inline Vec load(const bf16* p, int n, float other) {
    return select(first(n), widen16(_mm256_maskz_loadu_epi16(first(n), p)), other);
}
inline Vec load(const fp16* p, int n, float other) {
    return select(first(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)), other);
}
inline __m256i to_bf16(Vec x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const Mask nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    up = _mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}
inline __m256i to_fp16(Vec x) {
    return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, to_bf16(x)); }
inline void store(fp16* p, Vec x) { _mm256_storeu_si256((__m256i*)p, to_fp16(x)); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline void store(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x)); }
inline void store(fp16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, first(n), to_fp16(x)); }

inline Vec nearest(Vec x) {
    return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a 2^n for whole n; 0 where that is below the normal numbers, or n is minus infinity
inline Vec times_exp2(Vec a, Vec n) {
    const __m512 scaled = _mm512_scalef_ps(a.v, n.v);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-126.f), _CMP_NLT_UQ), scaled);
}
// The exponent of a positive normal number, of its mantissa in [sqrt(1/2), sqrt(2)).
inline Vec exponent(Vec x) {
    const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3f3504f3));
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(bits, 23));
}
inline Vec mantissa(Vec x) {
    const __m512i base = _mm512_set1_epi32(0x3f3504f3);
    const __m512i bits = _mm512_sub_epi32(_mm512_castps_si512(x.v), base);
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffff)), base));
}

#elif defined(__AVX2__)

constexpr int WIDTH = 8;
struct Vec {
    __m256 v;
    Vec() = default;
    Vec(__m256 x) : v(x) {}
    Vec(float x) : v(_mm256_set1_ps(x)) {}
};
using Mask = __m256;

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m); }
inline float sum(Vec a) {
    alignas(32) float x[WIDTH];
    _mm256_store_ps(x, a.v);
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}
inline float highest(Vec a) {
    alignas(32) float x[WIDTH];
    _mm256_store_ps(x, a.v);
    float most = x[0];
    for (float y : x) most = y > most ? y : most;
    return most;
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const bf16* p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
inline Vec load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
inline void store(bf16* p, Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    up = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
inline void store(fp16* p, Vec x) {
    const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.v, mode));
}

inline Vec nearest(Vec x) {
    return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vec times_exp2(Vec a, Vec n) {
    const __m256 normal = _mm256_cmp_ps(n.v, _mm256_set1_ps(-126.f), _CMP_NLT_UQ);
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    const __m256 scaled = _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
    return _mm256_and_ps(normal, scaled);
}
inline Vec exponent(Vec x) {
    const __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3f3504f3));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(bits, 23));
}
inline Vec mantissa(Vec x) {
    const __m256i base = _mm256_set1_epi32(0x3f3504f3);
    const __m256i bits = _mm256_sub_epi32(_mm256_castps_si256(x.v), base);
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff)), base));
}

#else  // plain C++, in loops that a compiler can make vectors of

constexpr int WIDTH = 8;
struct Vec {
    float v[WIDTH];
    Vec() = default;
    Vec(float x) {
        for (float& y : v) y = x;
    }
};
struct Mask {
    bool v[WIDTH];
};

template <class F>
inline Vec each(F f) {
    Vec r;
    for (int i = 0; i < WIDTH; i++) r.v[i] = f(i);
    return r;
}
template <class F>
inline Mask test(F f) {
    Mask r;
    for (int i = 0; i < WIDTH; i++) r.v[i] = f(i);
    return r;
}
inline Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Mask equal(Vec a, Vec b) {
    return test([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask greater(Vec a, Vec b) {
    return test([&](int i) { return a.v[i] > b.v[i]; });
}
inline Mask both(Mask a, Mask b) {
    return test([&](int i) { return a.v[i] && b.v[i]; });
}
inline Vec select(Mask m, Vec yes, Vec no) {
    return each([&](int i) { return m.v[i] ? yes.v[i] : no.v[i]; });
}
inline float sum(Vec a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
inline float highest(Vec a) {
    float most = a.v[0];
    for (float y : a.v) most = y > most ? y : most;
    return most;
}
template <class E>
inline Vec load(const E* p) {
    return each([&](int i) { return widen(p[i]); });
}
template <class E>
inline void store(E* p, Vec x) {
    for (int i = 0; i < WIDTH; i++) narrow(p[i], x.v[i]);
}
inline Vec nearest(Vec x) {  // for |x| < 2^22: the addition rounds to whole numbers
    return each([&](int i) { return (x.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}
inline Vec times_exp2(Vec a, Vec n) {
    return each([&](int i) {
        const float bounded = n.v[i] >= -126.f ? n.v[i] : -127.f;  // NaN is in a
        const float scaled = a.v[i] * as_float(uint32_t(int32_t(bounded) + 127) << 23);
        return n.v[i] < -126.f ? 0.f : scaled;
    });
}
inline Vec exponent(Vec x) {
    return each([&](int i) { return float(int32_t(as_bits(x.v[i]) - 0x3f3504f3u) >> 23); });
}
inline Vec mantissa(Vec x) {
    return each([&](int i) {
        return as_float(((as_bits(x.v[i]) - 0x3f3504f3u) & 0x7fffff) + 0x3f3504f3u);
    });
}

#endif

#if !defined(__AVX512F__)
template <class E>
inline Vec load(const E* p, int n, float other) {
    float x[WIDTH];
    for (int i = 0; i < WIDTH; i++) x[i] = i < n ? widen(p[i]) : other;
    return load(x);
}
template <class E>
inline void store(E* p, Vec x, int n) {
    E all[WIDTH];
    store(all, x);
    memcpy(p, all, n * sizeof(E));
}
#endif

// 2^(a b - c) for whole c, where that is below 128; 0 below 2^-126. x: the exponent, rounded. The
// fraction is taken from the product itself, so that the size of x costs the result no digits. The
// polynomial errs by 2e-9 of its value.
inline Vec exp2_of(Vec a, Vec b, Vec c, Vec& x) {
    x = fma(a, b, Vec(0.f) - c);
    const Vec n = nearest(x), f = fma(a, b, Vec(0.f) - (c + n));
    Vec p = fma(f, 1.53458104e-4f, 1.33999312e-3f);
    p = fma(p, f, 9.61848896e-3f);
    p = fma(p, f, 5.55032878e-2f);
    p = fma(p, f, 2.40226469e-1f);
    p = fma(p, f, 6.93147206e-1f);
    return times_exp2(fma(p, f, 1.f), n);
}
inline Vec exp2(Vec x) { return exp2_of(x, 1.f, 0.f, x); }

// log2 of a positive normal number. The polynomial errs by 3e-8 of its value.
inline Vec log2(Vec x) {
    const Vec r = mantissa(x) - Vec(1.f);
    Vec q = fma(r, 1.25836446e-1f, -2.07269466e-1f);
    q = fma(q, r, 2.15715689e-1f);
    q = fma(q, r, -2.38944867e-1f);
    q = fma(q, r, 2.87916244e-1f);
    q = fma(q, r, -3.60703681e-1f);
    q = fma(q, r, 4.80910643e-1f);
    q = fma(q, r, -7.21347347e-1f);
    q = fma(q, r, 1.442695f);
    return fma(q, r, exponent(x));
}

}  // namespace
