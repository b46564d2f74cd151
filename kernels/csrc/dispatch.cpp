// Which instruction set this machine has, and the way to its functions. Nothing here is compiled for
// more than the baseline, so that an older machine can ask.
#include "distilfast.h"

#include <errno.h>

#define DECLARE(level)                                                  \
    int distillation_##level(const distilfast_distillation_args*, int); \
    int hidden_cosine_##level(const distilfast_cosine_args*, int);      \
    int combine_teachers_##level(const distilfast_ensemble_args*, int); \
    int scale_##level(const distilfast_scale_args*, int);               \
    int accumulate_##level(const distilfast_accumulate_args*, int);     \
    int product_##level(const distilfast_product_args*, int);

DECLARE(plain)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#if defined(DISTILFAST_WITHOUT_AVX512BF16)
#define HAS_BF16 false
#define IF_BF16(call)
#else
DECLARE(avx512bf16)
#define HAS_BF16 __builtin_cpu_supports("avx512bf16")
#define IF_BF16(call) \
    case DISTILFAST_AVX512BF16: return call;
#endif
#define CHOOSE(function)                                                    \
    if (level < 0 || level > distilfast_best_level()) return ENOTSUP;       \
    switch (level) {                                                        \
        IF_BF16(function##_avx512bf16(args, threads))                       \
        case DISTILFAST_AVX512: return function##_avx512(args, threads);    \
        case DISTILFAST_AVX2: return function##_avx2(args, threads);        \
        default: return function##_plain(args, threads);                    \
    }
#else
#define CHOOSE(function)            \
    if (level != 0) return ENOTSUP; \
    return function##_plain(args, threads);
#endif

extern "C" {

int64_t distilfast_abi(void) {
    return DISTILFAST_ABI * 1000000 + sizeof(distilfast_matrix) +
           sizeof(distilfast_distillation_args) + sizeof(distilfast_cosine_args) +
           sizeof(distilfast_ensemble_args) + sizeof(distilfast_scale_args) +
           sizeof(distilfast_accumulate_args) + sizeof(distilfast_product_args);
}

int distilfast_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c"))
        return DISTILFAST_PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return DISTILFAST_AVX2;
    return HAS_BF16 ? DISTILFAST_AVX512BF16 : DISTILFAST_AVX512;
#else
    return DISTILFAST_PLAIN;
#endif
}

int distilfast_distillation(const distilfast_distillation_args* args, int level, int threads) {
    CHOOSE(distillation)
}
int distilfast_hidden_cosine(const distilfast_cosine_args* args, int level, int threads) {
    CHOOSE(hidden_cosine)
}
int distilfast_combine_teachers(const distilfast_ensemble_args* args, int level, int threads) {
    CHOOSE(combine_teachers)
}
int distilfast_scale(const distilfast_scale_args* args, int level, int threads) { CHOOSE(scale) }
int distilfast_accumulate(const distilfast_accumulate_args* args, int level, int threads) {
    CHOOSE(accumulate)
}
int distilfast_product(const distilfast_product_args* args, int level, int threads) { CHOOSE(product) }
}
