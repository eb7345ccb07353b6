// What the loader asks the library first: who built it, and for which instruction sets it can run here.
#include "parallel.h"

#ifndef REWARM_BUILD
#error "define REWARM_BUILD as the package version and the digest of csrc/ (setup.py does)"
#endif

namespace rewarm {

int best_isa() {
#if REWARM_X86
    static const int best = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            return AVX512;
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : PORTABLE;
    }();
    return best;
#else
    return PORTABLE;
#endif
}

}  // namespace rewarm

extern "C" {

const char* rewarm_build() { return REWARM_BUILD; }

int rewarm_best_isa() { return rewarm::best_isa(); }

int rewarm_max_threads() { return omp_get_max_threads(); }
}
