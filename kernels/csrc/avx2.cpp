// AVX2: compiled with -mavx2 -mfma -mf16c.
#include "kernels.h"
#define LEVEL avx2
#include "level.h"
