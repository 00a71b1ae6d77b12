#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace scalekern {

namespace {

Isa detect() {
  Isa found = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) found = Isa::avx2;
  if (__builtin_cpu_supports("x86-64-v4")) found = Isa::avx512;
#endif
  const char* cap = std::getenv("SCALEKERN_CPU_ISA");
  if (cap == nullptr) return found;
  if (std::strcmp(cap, "baseline") == 0) return Isa::baseline;
  if (std::strcmp(cap, "avx2") == 0 && found == Isa::avx512) return Isa::avx2;
  return found;
}

}  // namespace

Isa isa() {
  static const Isa level = detect();
  return level;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace scalekern
