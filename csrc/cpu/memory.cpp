#include "memory.h"

#include <cstring>

namespace danet {

void poison(void* data, int64_t bytes) { std::memset(data, 0xff, static_cast<size_t>(bytes)); }

}  // namespace danet
