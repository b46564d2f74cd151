// AVX-512 with bf16: compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma.
#include "kernels.h"
#define LEVEL avx512
#include "level.h"
