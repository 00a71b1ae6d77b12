#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace scalekern {

namespace {

enum class Level { baseline, avx2, avx512, vnni, bf16, amx };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "vnni", "bf16", "amx"};

#if defined(__x86_64__)
// Read from cpuid: compilers of 2020 do not know the names.
struct Features {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Features(unsigned part) { __get_cpuid_count(7, part, &a, &b, &c, &d); }
};

bool finds_vnni() { return Features(0).c >> 11 & 1; }

bool finds_bf16() { return (Features(0).c >> 1 & 1) && (Features(1).a >> 5 & 1); }  // avx512-vbmi, avx512-bf16

// amx-bf16, amx-tile, amx-int8; and the system gives this process the registers on request.
bool finds_amx() {
  constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;
  if ((Features(0).d & kTiles) != kTiles) return false;
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Level detect() {
  Level found = Level::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) found = Level::avx2;
  if (__builtin_cpu_supports("x86-64-v4")) found = Level::avx512;
  if (found == Level::avx512 && finds_vnni()) found = Level::vnni;
  if (found == Level::vnni && finds_bf16()) found = Level::bf16;
  if (found == Level::bf16 && finds_amx()) found = Level::amx;
#endif
  return found;
}

// The machine's level, or the one that `cap` names where that is a lower one.
Level capped(const char* cap) {
  static const Level found = detect();
  for (int level = 0; cap && level < int(found); ++level)
    if (std::strcmp(cap, kNames[level]) == 0) return Level(level);
  return found;
}

std::atomic<Level>& in_use() {
  static std::atomic<Level> level = capped(std::getenv("SCALEKERN_CPU_ISA"));
  return level;
}

Level level() { return in_use().load(std::memory_order_relaxed); }

}  // namespace

Isa isa() { return level() >= Level::avx512 ? Isa::avx512 : level() == Level::avx2 ? Isa::avx2 : Isa::baseline; }
bool has_vnni() { return level() >= Level::vnni; }
bool has_bf16() { return level() >= Level::bf16; }
bool has_amx() { return level() >= Level::amx; }
const char* isa_name() { return kNames[int(level())]; }

}  // namespace scalekern

// The name of the level in use, from now on `level`, or the machine's where that is lower; null changes nothing.
extern "C" __attribute__((visibility("default"))) const char* scalekern_cpu_isa(const char* level) {
  if (level) scalekern::in_use() = scalekern::capped(level);
  return scalekern::isa_name();
}
