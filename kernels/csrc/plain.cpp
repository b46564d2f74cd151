// Plain C++, for any machine.
#include "kernels.h"
#define LEVEL plain
#include "level.h"
