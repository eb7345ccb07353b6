// Conversions of flat device arrays, and the split of the fp32 master, for copies whose two ends have one type.
//
// Pointers are device memory; `stream` is a cudaStream_t. Functions return a CUDA error code, 0 for success.
#include "launch.h"

namespace rewarm {
namespace {

template <int FROM, int TO>
struct Cast {
    const void* source;
    void* target;
    __device__ __forceinline__ void operator()(int64_t i) const { store<TO>(target, i, load<FROM>(source, i)); }
};

template <int FROM>
int cast_from(int64_t elements, const void* source, void* target, int to, void* stream) {
    switch (to) {
        case FLOAT32: return launch(Cast<FROM, FLOAT32>{source, target}, elements, stream);
        case BFLOAT16: return launch(Cast<FROM, BFLOAT16>{source, target}, elements, stream);
        case FLOAT16: return launch(Cast<FROM, FLOAT16>{source, target}, elements, stream);
        default: return cudaErrorInvalidValue;
    }
}

struct StochasticCast {
    const float* __restrict__ source;
    uint16_t* __restrict__ target;
    uint64_t seed;
    uint64_t first;
    __device__ __forceinline__ void operator()(int64_t i) const {
        target[i] = to_bfloat16_stochastic(source[i], noise16(first + uint64_t(i), seed));
    }
};

struct SplitMaster {
    const float* __restrict__ master;
    uint16_t* __restrict__ high;
    uint16_t* __restrict__ low;
    float* __restrict__ moment2;
    __device__ __forceinline__ void operator()(int64_t i) const {
        const Split parts = split(master[i]);
        high[i] = parts.high;
        low[i] = parts.low;
        moment2[i] = with_sign(moment2[i], parts.tie_up);
    }
};

struct JoinMaster {
    const uint16_t* __restrict__ high;
    const uint16_t* __restrict__ low;
    float* __restrict__ moment2;
    float* __restrict__ master;
    __device__ __forceinline__ void operator()(int64_t i) const {
        master[i] = join(high[i], low[i], sign_of(moment2[i]));
        moment2[i] = with_sign(moment2[i], 0);
    }
};

}  // namespace
}  // namespace rewarm

extern "C" {

int rewarm_cuda_cast(int64_t elements, const void* source, int from, void* target, int to, void* stream) {
    using namespace rewarm;
    switch (from) {
        case FLOAT32: return cast_from<FLOAT32>(elements, source, target, to, stream);
        case BFLOAT16: return cast_from<BFLOAT16>(elements, source, target, to, stream);
        case FLOAT16: return cast_from<FLOAT16>(elements, source, target, to, stream);
        default: return cudaErrorInvalidValue;
    }
}

int rewarm_cuda_cast_stochastic(int64_t elements, const float* source, uint16_t* target, uint64_t seed, uint64_t first,
                                void* stream) {
    return rewarm::launch(rewarm::StochasticCast{source, target, seed, first}, elements, stream);
}

int rewarm_cuda_split(int64_t elements, const float* master, uint16_t* high, uint16_t* low, float* moment2,
                      void* stream) {
    return rewarm::launch(rewarm::SplitMaster{master, high, low, moment2}, elements, stream);
}

int rewarm_cuda_join(int64_t elements, const uint16_t* high, const uint16_t* low, float* moment2, float* master,
                     void* stream) {
    return rewarm::launch(rewarm::JoinMaster{high, low, moment2, master}, elements, stream);
}
}
