// AdamW on CUDA: the element update of the CPU, so the bits are those of the CPU.
//
// Pointers are device memory; `stream` is a cudaStream_t. Functions return a CUDA error code, 0 for success.
#include "../common/adamw.h"

#include "launch.h"

namespace rewarm {
namespace {

template <int GRAD, int OUT>
struct Update {
    float* __restrict__ master;
    float* __restrict__ moment1;
    float* __restrict__ moment2;
    const void* grad;
    void* out;
    rewarm_adamw_step step;
    __device__ __forceinline__ void operator()(int64_t i) const {
        float p = master[i], m = moment1[i], v = moment2[i];
        adamw(step, load<GRAD>(grad, i), p, m, v);
        master[i] = p;
        moment1[i] = m;
        moment2[i] = v;
        if (OUT != NONE) store<OUT>(out, i, p);
    }
};

template <int GRAD>
struct UpdateSplit {
    uint16_t* __restrict__ high;
    uint16_t* __restrict__ low;
    float* __restrict__ moment1;
    float* __restrict__ moment2;
    const void* grad;
    rewarm_adamw_step step;
    __device__ __forceinline__ void operator()(int64_t i) const {
        float m = moment1[i], v = moment2[i];
        float p = join(high[i], low[i], sign_of(v));
        v = with_sign(v, 0);
        adamw(step, load<GRAD>(grad, i), p, m, v);
        const Split parts = split(p);
        high[i] = parts.high;
        low[i] = parts.low;
        moment1[i] = m;
        moment2[i] = with_sign(v, parts.tie_up);
    }
};

template <int GRAD>
int update_for_out(int64_t elements, float* master, float* moment1, float* moment2, const void* grad, void* out,
                   int out_type, const rewarm_adamw_step& step, void* stream) {
    switch (out_type) {
        case NONE: return launch(Update<GRAD, NONE>{master, moment1, moment2, grad, out, step}, elements, stream);
        case BFLOAT16:
            return launch(Update<GRAD, BFLOAT16>{master, moment1, moment2, grad, out, step}, elements, stream);
        case FLOAT16:
            return launch(Update<GRAD, FLOAT16>{master, moment1, moment2, grad, out, step}, elements, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace rewarm

extern "C" {

int rewarm_cuda_adamw(int64_t elements, float* master, float* moment1, float* moment2, const void* grad, int grad_type,
                      void* out, int out_type, const rewarm_adamw_step* step, void* stream) {
    using namespace rewarm;
    switch (grad_type) {
        case FLOAT32:
            return update_for_out<FLOAT32>(elements, master, moment1, moment2, grad, out, out_type, *step, stream);
        case BFLOAT16:
            return update_for_out<BFLOAT16>(elements, master, moment1, moment2, grad, out, out_type, *step, stream);
        case FLOAT16:
            return update_for_out<FLOAT16>(elements, master, moment1, moment2, grad, out, out_type, *step, stream);
        default: return cudaErrorInvalidValue;
    }
}

int rewarm_cuda_adamw_split(int64_t elements, uint16_t* high, uint16_t* low, float* moment1, float* moment2,
                            const void* grad, int grad_type, const rewarm_adamw_step* step, void* stream) {
    using namespace rewarm;
    switch (grad_type) {
        case FLOAT32:
            return launch(UpdateSplit<FLOAT32>{high, low, moment1, moment2, grad, *step}, elements, stream);
        case BFLOAT16:
            return launch(UpdateSplit<BFLOAT16>{high, low, moment1, moment2, grad, *step}, elements, stream);
        case FLOAT16:
            return launch(UpdateSplit<FLOAT16>{high, low, moment1, moment2, grad, *step}, elements, stream);
        default: return cudaErrorInvalidValue;
    }
}
}
