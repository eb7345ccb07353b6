// AdamW on CUDA with moments kept as block-wise quantised bytes: approximate, and the bits of the CPU's.
//
// One thread block updates one quantised block. Maxima do not depend on their order, so neither do the bits.
#include <cuda_runtime.h>

#include "../common/quantize.h"

namespace rewarm {
namespace {

constexpr int THREADS_8BIT = 256;
constexpr int PER_THREAD = int(QUANTIZED_BLOCK) / THREADS_8BIT;

__constant__ const Codebook<SIGNED_WIDTH> SIGNED_CODES;
__constant__ const Codebook<UNSIGNED_WIDTH> UNSIGNED_CODES;

struct QuantizedState {
    int64_t elements;
    float* master;
    uint8_t* moment1;
    uint8_t* moment2;
    float* scale1;
    float* scale2;
    const void* grad;
    void* out;
};

template <int GRAD, int OUT>
__global__ void __launch_bounds__(THREADS_8BIT) update_quantized(QuantizedState s, rewarm_adamw_step step) {
    __shared__ float codes1[256], codes2[256];  // threads read different entries: constant memory would serialise them
    __shared__ unsigned largest1, largest2;
    codes1[threadIdx.x] = SIGNED_CODES.value[threadIdx.x];
    codes2[threadIdx.x] = UNSIGNED_CODES.value[threadIdx.x];
    if (threadIdx.x == 0) largest1 = largest2 = 0;
    __syncthreads();
    const int64_t first = int64_t(blockIdx.x) * QUANTIZED_BLOCK + threadIdx.x;
    const float scale1 = s.scale1[blockIdx.x], scale2 = s.scale2[blockIdx.x];
    float m[PER_THREAD], v[PER_THREAD], ceiling[PER_THREAD];
    unsigned most1 = 0, most2 = 0;
#pragma unroll
    for (int turn = 0; turn < PER_THREAD; turn++) {
        const int64_t i = first + int64_t(turn) * THREADS_8BIT;
        if (i >= s.elements) break;
        float p = s.master[i];
        m[turn] = mul_rn(codes1[s.moment1[i]], scale1);
        v[turn] = mul_rn(codes2[s.moment2[i]], scale2);
        const float grad = load<GRAD>(s.grad, i);
        ceiling[turn] = ceiling_of(mul_rn(grad, step.grad_scale), m[turn]);
        adamw(step, grad, p, m[turn], v[turn]);
        s.master[i] = p;
        if (OUT != NONE) store<OUT>(s.out, i, p);
        most1 = max(most1, bits_of(m[turn]) & 0x7FFFFFFFu);
        most2 = max(most2, bits_of(v[turn]) & 0x7FFFFFFFu);
    }
    atomicMax(&largest1, most1);
    atomicMax(&largest2, most2);
    __syncthreads();
    const float next1 = scale_of(largest1), next2 = scale_of(largest2);
    if (threadIdx.x == 0) {
        s.scale1[blockIdx.x] = next1;
        s.scale2[blockIdx.x] = next2;
    }
    const float inverse1 = inverse_of<SIGNED_WIDTH>(next1), inverse2 = inverse_of<UNSIGNED_WIDTH>(next2);
#pragma unroll
    for (int turn = 0; turn < PER_THREAD; turn++) {
        const int64_t i = first + int64_t(turn) * THREADS_8BIT;
        if (i >= s.elements) break;
        const uint8_t code = quantize_signed(m[turn], inverse1);
        s.moment1[i] = ebb(code, mul_rn(codes1[code], next1), ceiling[turn]);
        s.moment2[i] = quantize_unsigned(v[turn], inverse2);
    }
}

template <int GRAD, int OUT>
int start(const QuantizedState& state, const rewarm_adamw_step& step, void* stream) {
    const int64_t blocks = (state.elements + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
    if (blocks == 0) return cudaSuccess;
    update_quantized<GRAD, OUT>
        <<<unsigned(blocks), THREADS_8BIT, 0, static_cast<cudaStream_t>(stream)>>>(state, step);
    return cudaGetLastError();
}

template <int GRAD>
int start_for_out(const QuantizedState& state, const rewarm_adamw_step& step, int out, void* stream) {
    switch (out) {
        case NONE: return start<GRAD, NONE>(state, step, stream);
        case BFLOAT16: return start<GRAD, BFLOAT16>(state, step, stream);
        case FLOAT16: return start<GRAD, FLOAT16>(state, step, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace rewarm

extern "C" {

int rewarm_cuda_adamw_8bit(int64_t elements, float* master, uint8_t* moment1, uint8_t* moment2, float* scale1,
                           float* scale2, const void* grad, int grad_type, void* out, int out_type,
                           const rewarm_adamw_step* step, void* stream) {
    using namespace rewarm;
    const QuantizedState state{elements, master, moment1, moment2, scale1, scale2, grad, out};
    switch (grad_type) {
        case FLOAT32: return start_for_out<FLOAT32>(state, *step, out_type, stream);
        case BFLOAT16: return start_for_out<BFLOAT16>(state, *step, out_type, stream);
        case FLOAT16: return start_for_out<FLOAT16>(state, *step, out_type, stream);
        default: return cudaErrorInvalidValue;
    }
}
}
