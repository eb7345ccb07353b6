// Cutting a flat array over OpenMP threads, and compiling one body for several instruction sets.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "../common/numeric.h"

#if defined(__x86_64__)
#define REWARM_X86 1
#define REWARM_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define REWARM_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")))
#else
#define REWARM_X86 0
#endif

namespace rewarm {

enum Isa : int { BEST = -1, PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

// The widest instruction set of this CPU that the library was compiled for.
int best_isa();

constexpr int64_t SLICE_ALIGNMENT = 64;       // elements: a whole cache line of the narrowest array
constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below this, waking threads costs more than the work

// Call work(begin, end) on one contiguous slice of the items per thread; an item is `unit` elements.
template <class Work>
void for_slices(int64_t items, int64_t unit, int threads, Work work) {
    if (items * unit <= SERIAL_ELEMENTS || omp_in_parallel()) threads = 1;
    if (threads <= 0) threads = omp_get_max_threads();
    if (threads == 1) {
        work(int64_t(0), items);
        return;
    }
    const int64_t alignment = std::max<int64_t>(1, SLICE_ALIGNMENT / unit);
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
        const int64_t share = (items + team - 1) / team;
        const int64_t slice = (share + alignment - 1) / alignment * alignment;
        const int64_t begin = std::min(items, rank * slice), end = std::min(items, begin + slice);
        if (begin < end) work(begin, end);
    }
}

// One always-inlined body, compiled again under the target of each instruction set.
template <class Body>
void run_portable(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}

#if REWARM_X86
template <class Body>
REWARM_TARGET_AVX2 void run_avx2(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}

template <class Body>
REWARM_TARGET_AVX512 void run_avx512(const Body& body, int64_t begin, int64_t end) {
    body(begin, end);
}
#endif

// Call body(begin, end) on one slice per thread with the widest instruction set, or at most `isa`;
// an item is `unit` elements.
template <class Body>
void run(const Body& body, int64_t items, int threads, int isa = BEST, int64_t unit = 1) {
    isa = isa < 0 ? best_isa() : std::min(isa, best_isa());
    for_slices(items, unit, threads, [&](int64_t begin, int64_t end) {
#if REWARM_X86
        if (isa == AVX512) return run_avx512(body, begin, end);
        if (isa == AVX2) return run_avx2(body, begin, end);
#endif
        run_portable(body, begin, end);
    });
}

}  // namespace rewarm
