// Cutting a flat array over OpenMP threads, and compiling one body for several instruction sets.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../common/numeric.h"

namespace rewarm {

enum Isa : int { BEST = -1, PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// The widest instruction set of this CPU that the library was compiled for.
int best_isa();

constexpr int64_t SLICE_ALIGNMENT = 64;      // elements: a whole cache line of the narrowest array
constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below this, waking threads costs more than the work

inline int thread_count(int requested, int64_t elements) {
    if (elements <= SERIAL_ELEMENTS || omp_in_parallel()) return 1;
    return requested > 0 ? requested : omp_get_max_threads();
}

// Call work(begin, end) on one contiguous slice per thread.
template <class Work>
void for_slices(int64_t elements, int threads, Work work) {
    const int count = thread_count(threads, elements);
    if (count == 1) {
        work(int64_t(0), elements);
        return;
    }
#pragma omp parallel num_threads(count)
    {
        const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
        const int64_t share = (elements + team - 1) / team;
        const int64_t slice = (share + SLICE_ALIGNMENT - 1) / SLICE_ALIGNMENT * SLICE_ALIGNMENT;
        const int64_t begin = std::min(elements, rank * slice), end = std::min(elements, begin + slice);
        if (begin < end) work(begin, end);
    }
}

}  // namespace rewarm

#if defined(__x86_64__)
#define REWARM_X86 1
#define REWARM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define REWARM_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define REWARM_X86 0
#endif
