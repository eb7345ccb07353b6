// Conversions of flat arrays, the split of the fp32 master, the sum of squares of a gradient, and a bandwidth probe.
#include <cmath>

#include "parallel.h"
#include "stream.h"

namespace rewarm {
namespace {

template <int FROM, int TO>
struct Cast {
    const void* source;
    void* target;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
#pragma GCC ivdep
        for (int64_t i = begin; i < end; i++) store<TO>(target, i, load<FROM>(source, i));
    }
};

template <int FROM>
int cast_from(const void* source, void* target, int to, int64_t elements, int threads) {
    switch (to) {
        case FLOAT32: run(Cast<FROM, FLOAT32>{source, target}, elements, threads); return 0;
        case BFLOAT16: run(Cast<FROM, BFLOAT16>{source, target}, elements, threads); return 0;
        case FLOAT16: run(Cast<FROM, FLOAT16>{source, target}, elements, threads); return 0;
        default: return -1;
    }
}

struct StochasticCast {
    const float* __restrict__ source;
    uint16_t* __restrict__ target;
    uint64_t seed;
    uint64_t first;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
#pragma GCC ivdep
        for (int64_t i = begin; i < end; i++)
            target[i] = to_bfloat16_stochastic(source[i], noise16(first + uint64_t(i), seed));
    }
};

struct SplitMaster {
    const float* __restrict__ master;
    uint16_t* __restrict__ high;
    uint16_t* __restrict__ low;
    float* __restrict__ moment2;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
#pragma GCC ivdep
        for (int64_t i = begin; i < end; i++) {
            const Split parts = split(master[i]);
            high[i] = parts.high;
            low[i] = parts.low;
            moment2[i] = with_sign(moment2[i], parts.tie_up);
        }
    }
};

struct JoinMaster {
    const uint16_t* __restrict__ high;
    const uint16_t* __restrict__ low;
    float* __restrict__ moment2;
    float* __restrict__ master;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
#pragma GCC ivdep
        for (int64_t i = begin; i < end; i++) {
            master[i] = join(high[i], low[i], sign_of(moment2[i]));
            moment2[i] = with_sign(moment2[i], 0);
        }
    }
};

constexpr int64_t SUM_BLOCK = 4096;  // elements; the order of the sum depends on these blocks alone
constexpr int SUM_LANES = 16;

template <int FROM>
struct SumBlocks {
    const void* source;
    int64_t elements;
    double* sums;  // one per block
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        for (int64_t block = begin; block < end; block++) {
            double lanes[SUM_LANES] = {};
            const int64_t first = block * SUM_BLOCK, last = std::min(first + SUM_BLOCK, elements);
            int64_t i = first;
            for (; i + SUM_LANES <= last; i += SUM_LANES)
                for (int lane = 0; lane < SUM_LANES; lane++) {
                    const double value = load<FROM>(source, i + lane);
                    lanes[lane] += value * value;
                }
            for (int lane = 0; i < last; i++, lane++) {
                const double value = load<FROM>(source, i);
                lanes[lane] += value * value;
            }
            double sum = 0;
            for (double lane : lanes) sum += lane;
            sums[block] = sum;
        }
    }
};

template <bool PREFETCH>
struct InPlaceProbe {
    const float* __restrict__ grad;
    float* __restrict__ a;
    float* __restrict__ b;
    float* __restrict__ c;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        for (int64_t first = begin; first < end; first += TILE) {
            const int64_t ahead = first + PREFETCH_TILES * TILE, last = std::min(first + TILE, end);
            if (PREFETCH) {
                prefetch_tile(grad, ahead);
                prefetch_tile(a, ahead);
                prefetch_tile(b, ahead);
                prefetch_tile(c, ahead);
            }
#pragma GCC ivdep
            for (int64_t i = first; i < last; i++) {
                const float g = grad[i];
                a[i] += g;
                b[i] += g;
                c[i] += g;
            }
        }
    }
};

}  // namespace
}  // namespace rewarm

extern "C" {

// Convert between fp32, bf16 and fp16, to nearest. Returns 0, or -1 if a type is not supported.
int rewarm_cast(int64_t elements, const void* source, int from, void* target, int to, int threads) {
    using namespace rewarm;
    switch (from) {
        case FLOAT32: return cast_from<FLOAT32>(source, target, to, elements, threads);
        case BFLOAT16: return cast_from<BFLOAT16>(source, target, to, elements, threads);
        case FLOAT16: return cast_from<FLOAT16>(source, target, to, elements, threads);
        default: return -1;
    }
}

// Round fp32 to bf16 stochastically. The noise of element i is a function of (seed, first + i) alone.
void rewarm_cast_stochastic(int64_t elements, const float* source, uint16_t* target, uint64_t seed, uint64_t first,
                            int threads) {
    rewarm::run(rewarm::StochasticCast{source, target, seed, first}, elements, threads);
}

// Split the master into its bf16 rounding and its low 16 bits; the sign of moment2 receives the ties.
void rewarm_split(int64_t elements, const float* master, uint16_t* high, uint16_t* low, float* moment2, int threads) {
    rewarm::run(rewarm::SplitMaster{master, high, low, moment2}, elements, threads);
}

// The inverse of rewarm_split, exact for every value but NaN (which stays a NaN); clears the sign of moment2.
void rewarm_join(int64_t elements, const uint16_t* high, const uint16_t* low, float* moment2, float* master,
                 int threads) {
    rewarm::run(rewarm::JoinMaster{high, low, moment2, master}, elements, threads);
}

// Number of partial sums that rewarm_sum_squares needs room for.
int64_t rewarm_sum_squares_blocks(int64_t elements) {
    return (elements + rewarm::SUM_BLOCK - 1) / rewarm::SUM_BLOCK;
}

// Sum of squares in double precision, the same for any number of threads; not finite exactly if an element is not
// (squares of fp32 numbers fit in a double). NaN if the type is not supported.
double rewarm_sum_squares(int64_t elements, const void* source, int type, double* partial, int threads) {
    using namespace rewarm;
    const int64_t blocks = rewarm_sum_squares_blocks(elements);
    auto all = [&](auto body) { run(body, blocks, threads, BEST, SUM_BLOCK); };
    switch (type) {
        case FLOAT32: all(SumBlocks<FLOAT32>{source, elements, partial}); break;
        case BFLOAT16: all(SumBlocks<BFLOAT16>{source, elements, partial}); break;
        case FLOAT16: all(SumBlocks<FLOAT16>{source, elements, partial}); break;
        default: return NAN;
    }
    double sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += partial[block];
    return sum;
}

// Four reads and three writes per element in place, as AdamW does, with next to no arithmetic: the limit to compare
// an update's bandwidth with. Which of the two, with software prefetch or without, is faster depends on the processor.
void rewarm_probe_in_place(int64_t elements, const float* grad, float* a, float* b, float* c, int prefetch,
                           int threads) {
    using namespace rewarm;
    if (prefetch) run(InPlaceProbe<true>{grad, a, b, c}, elements, threads);
    else run(InPlaceProbe<false>{grad, a, b, c}, elements, threads);
}
}
