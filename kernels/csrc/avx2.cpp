// AVX2 with FMA and F16C.
#define LEVEL avx2
#include "level.h"
