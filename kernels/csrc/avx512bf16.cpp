// AVX-512 with the conversion to bf16, as Cooper Lake, Sapphire Rapids and Zen 4 have it.
#define LEVEL avx512bf16
#include "level.h"
