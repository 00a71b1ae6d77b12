// Instruction-set levels of the CPU kernels, and the choice among them when the library is loaded.
//
// A file cpu_*_kernel.cpp is compiled once a level with -DSCALEKERN_ISA=<level>; its entry points live in
// namespace scalekern::<level>, everything else in it in an anonymous namespace. It includes no torch and no
// C++ standard container: an inline function shared with another level would be merged by the linker, and then
// the baseline could run AVX-512 code. A file cpu_*.cpp without _kernel is compiled once, for the baseline.
#pragma once

#if defined(__x86_64__)
#define SCALEKERN_FOR_EACH_ISA(X) X(baseline) X(avx2) X(avx512)
#else
#define SCALEKERN_FOR_EACH_ISA(X) X(baseline)
#endif

namespace scalekern {

enum class Isa { baseline, avx2, avx512 };

// The level in use: what the machine has, capped by SCALEKERN_CPU_ISA or _native.cpu_isa. Its name is that of the
// further instructions in use (vnni, bf16, amx: common/amx.h), where there are some: their records are others than
// avx512's.
Isa isa();
const char* isa_name();

}  // namespace scalekern

// Declare an entry point in every level:  SCALEKERN_DECLARE(void, name, (const Args&))
#if defined(__x86_64__)
#define SCALEKERN_DECLARE(ret, name, params)                \
  namespace scalekern::baseline { ret name params; }        \
  namespace scalekern::avx2 { ret name params; }            \
  namespace scalekern::avx512 { ret name params; }
// Call it in the level in use:  SCALEKERN_CALL(name, (args))
#define SCALEKERN_CALL(name, args)                                                    \
  (scalekern::isa() == scalekern::Isa::avx512 ? scalekern::avx512::name args          \
   : scalekern::isa() == scalekern::Isa::avx2 ? scalekern::avx2::name args            \
                                              : scalekern::baseline::name args)
#else
#define SCALEKERN_DECLARE(ret, name, params) namespace scalekern::baseline { ret name params; }
#define SCALEKERN_CALL(name, args) (scalekern::baseline::name args)
#endif
