// Fresh memory of large outputs.
#pragma once
#include <cstdint>

namespace scalekern {

// A kernel is about to write all of this memory, which may never have been touched: let the system back it with 2 MiB
// pages, one fault each instead of 512. Memory that is smaller stays as it is.
void expect_writes(void* data, int64_t bytes);

}  // namespace scalekern
