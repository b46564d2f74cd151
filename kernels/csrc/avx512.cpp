// AVX-512 as Skylake has it.
#define LEVEL avx512
#include "level.h"
