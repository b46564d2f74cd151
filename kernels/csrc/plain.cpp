// Plain C++, for any machine.
#define LEVEL plain
#include "level.h"
