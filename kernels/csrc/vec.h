// A vector of fp32 for the instruction set that a file is compiled for, and loads and stores that
// convert. Where n is given, only the first n < WIDTH elements are touched.
//
// fma rounds once where the machine has such an instruction; exact_fma has an exact product everywhere.
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

// One element, for the label's column.
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
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));
struct Vec {
    __m512 v;
    Vec() = default;
    Vec(__m512 x) : v(x) {}
    Vec(float x) : v(_mm512_set1_ps(x)) {}
};
using Mask = __mmask16;

inline Mask leading(int n) { return Mask((1u << n) - 1); }
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline bool all(Mask m) { return m == 0xffff; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no.v, yes.v); }
inline float highest(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec widen16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load(const bf16* p) { return widen16(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const float* p, int n, float other) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(other), leading(n), p);
}
inline Vec load(const bf16* p, int n, float other) {
    return select(leading(n), widen16(_mm256_maskz_loadu_epi16(leading(n), p)), other);
}
inline Vec load(const fp16* p, int n, float other) {
    return select(leading(n), _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(leading(n), p)), other);
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
// Past the caches, to a multiple of the vector's size; and when it has to have arrived.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
inline void stream(bf16* p, Vec x) { _mm256_stream_si256((__m256i*)p, to_bf16(x)); }
inline void stream(fp16* p, Vec x) { _mm256_stream_si256((__m256i*)p, to_fp16(x)); }
inline void end_streaming() { _mm_sfence(); }
inline float first(Vec a) { return _mm512_cvtss_f32(a.v); }
inline void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, leading(n), x.v); }
inline void store(bf16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, leading(n), to_bf16(x)); }
inline void store(fp16* p, Vec x, int n) { _mm256_mask_storeu_epi16(p, leading(n), to_fp16(x)); }

// For 2^x: x bounded so that the next two can take it; the whole number below it; x less that; and a
// times 2 to that, which is 0 or infinity out of fp32's range. Here any x will do.
inline Vec bounded(Vec x) { return x; }
inline Vec whole(Vec x) {
    return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline Vec fraction(Vec x) {
    return _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline Vec times_exp2(Vec a, Vec x) { return _mm512_scalef_ps(a.v, x.v); }
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
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));
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
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline Mask greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline bool all(Mask m) { return _mm256_movemask_ps(m) == 0xff; }
inline Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m); }
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
inline __m128i to_bf16(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    up = _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xd8);
    return _mm256_castsi256_si128(packed);
}
inline __m128i to_fp16(Vec x) {
    return _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline void store(bf16* p, Vec x) { _mm_storeu_si128((__m128i*)p, to_bf16(x)); }
inline void store(fp16* p, Vec x) { _mm_storeu_si128((__m128i*)p, to_fp16(x)); }
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x.v); }
inline void stream(bf16* p, Vec x) { _mm_stream_si128((__m128i*)p, to_bf16(x)); }
inline void stream(fp16* p, Vec x) { _mm_stream_si128((__m128i*)p, to_fp16(x)); }
inline void end_streaming() { _mm_sfence(); }
inline float first(Vec a) { return _mm256_cvtss_f32(a.v); }

inline Vec bounded(Vec x) { return min(128.5f, max(-126.5f, x)); }
inline Vec whole(Vec x) {
    return _mm256_round_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline Vec fraction(Vec x) { return x - whole(x); }
inline Vec times_exp2(Vec a, Vec x) {
    const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(whole(x).v), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
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

#else  // for any machine: 16 bytes, which GCC and clang make SSE2 or NEON of

constexpr int WIDTH = 4;
typedef double Doubles __attribute__((vector_size(WIDTH * sizeof(double))));
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));
struct Vec {
    Floats v;
    Vec() = default;
    Vec(Floats x) : v(x) {}
    Vec(float x) : v(Floats{x, x, x, x}) {}
};
using Mask = Ints;

inline Vec operator+(Vec a, Vec b) { return a.v + b.v; }
inline Vec operator-(Vec a, Vec b) { return a.v - b.v; }
inline Vec operator*(Vec a, Vec b) { return a.v * b.v; }
inline Vec operator/(Vec a, Vec b) { return a.v / b.v; }
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < WIDTH; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
inline Vec exact_fma(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
inline Vec exact_fma(Vec a, Vec b, Vec c) {  // a product of two fp32 is exact in fp64
    const Doubles x = __builtin_convertvector(a.v, Doubles), y = __builtin_convertvector(b.v, Doubles);
    return __builtin_convertvector(x * y + __builtin_convertvector(c.v, Doubles), Floats);
}
#endif
inline Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
inline Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
inline Mask equal(Vec a, Vec b) { return a.v == b.v; }
inline Mask greater(Vec a, Vec b) { return a.v > b.v; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline bool all(Mask m) { return m[0] && m[1] && m[2] && m[3]; }
inline Vec select(Mask m, Vec yes, Vec no) { return m ? yes.v : no.v; }
inline float highest(Vec a) {
    const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return x > y ? x : y;
}
inline float first(Vec a) { return a.v[0]; }

inline Bits load_halves(const void* p) {
    Halves x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, Bits);
}
inline void store_halves(void* p, Bits bits) {
    const Halves x = __builtin_convertvector(bits, Halves);
    memcpy(p, &x, sizeof x);
}
inline Vec load(const float* p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
inline Vec load(const bf16* p) { return (Floats)(load_halves(p) << 16); }
inline Vec load(const fp16* p) {
    const Bits x = load_halves(p), magnitude = x & 0x7fff;
    const Bits finite = (Bits)((Floats)(magnitude << 13) * 0x1p112f);
    const Bits other = 0x7f800000 | (magnitude << 13);
    return (Floats)((x & 0x8000) << 16 | (magnitude >= 0x7c00 ? other : finite));
}
inline void store(float* p, Vec x) { memcpy(p, &x.v, sizeof x.v); }
inline void store(bf16* p, Vec x) {
    const Bits bits = (Bits)x.v;
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    store_halves(p, x.v == x.v ? rounded : nan);
}
inline void store(fp16* p, Vec x) {  // the steps of narrow(fp16&, float)
    const Bits bits = (Bits)x.v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const Bits subnormal = (Bits)((Floats)magnitude + 0.5f) - (Bits)(Floats{} + 0.5f);
    Bits half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    half = magnitude < 0x38800000 ? subnormal : half;
    half = magnitude >= 0x477ff000 ? Bits{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? Bits{} + 0x7e00 : half;
    store_halves(p, sign | half);
}
template <class E>
inline void stream(E* p, Vec x) {
    store(p, x);
}
inline void end_streaming() {}

inline Vec bounded(Vec x) { return min(128.5f, max(-126.5f, x)); }
// The addition rounds to whole numbers. Where x is one itself either neighbour is as good.
inline Vec whole(Vec x) { return (x.v - 0.5f + 0x1.8p23f) - 0x1.8p23f; }
inline Vec fraction(Vec x) { return x - whole(x); }
inline Vec times_exp2(Vec a, Vec x) {  // the low bits of the sum are the whole number's
    const Bits power = (Bits)(x.v - 0.5f + 0x1.8p23f) + 127;
    return a.v * (Floats)(power << 23);
}
inline Vec exponent(Vec x) {
    return __builtin_convertvector((Ints)((Bits)x.v - 0x3f3504f3) >> 23, Floats);
}
inline Vec mantissa(Vec x) {
    return (Floats)((((Bits)x.v - 0x3f3504f3) & 0x7fffff) + 0x3f3504f3);
}

#endif

#if defined(__AVX2__)
inline Vec exact_fma(Vec a, Vec b, Vec c) { return fma(a, b, c); }
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

// 2^x: 0 for minus infinity, infinity from 2^128 on. It errs by 1e-7 of its value, and by what is
// rounded off x.
inline Vec exp2(Vec x) {
    x = bounded(x);
    const Vec f = fraction(x);
    Vec p = fma(f, 1.86713008e-3f, 9.01703028e-3f);
    p = fma(p, f, 5.57999131e-2f);
    p = fma(p, f, 2.4016445e-1f);
    p = fma(p, f, 6.93151312e-1f);
    return times_exp2(fma(p, f, 1.f), x);
}
// 2^(a b) where x is a b, rounded. The fraction is taken from the product itself, so that the size of
// x costs no digits, and the polynomial errs by 1e-8.
inline Vec exp2(Vec x, Vec a, Vec b) {
    x = bounded(x);
    const Vec n = whole(max(-127.f, x)), f = max(-1.f, exact_fma(a, b, Vec(0.f) - n));
    Vec p = fma(f, 2.1612915e-4f, 1.24678465e-3f);
    p = fma(p, f, 9.67545157e-3f);
    p = fma(p, f, 5.54852806e-2f);
    p = fma(p, f, 2.40229306e-1f);
    p = fma(p, f, 6.93147044e-1f);
    return times_exp2(fma(p, f, 1.f), x);
}

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
