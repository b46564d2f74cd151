// AVX-512 with bf16.
#define LEVEL avx512
#include "level.h"
