// The AdamW update of one element (Loshchilov and Hutter, 2019), written once for the CPU and for CUDA.
//
// Every operation is correctly rounded under IEEE 754 (multiply, add, fused multiply-add, division, square root) and
// their order is fixed here, so each instruction set, each device and each way to cut the state gives the same bits.
// The CPU files are compiled with -ffp-contract=off; on CUDA the intrinsics keep the compiler from contracting.
#pragma once

#include "numeric.h"

// Everything about a step that is the same for all elements; computed in double precision and
// rounded once by rewarm.kernels.adamw.AdamWStep, which mirrors it.
struct rewarm_adamw_step {
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float inverse_sqrt_correction2;
    float epsilon;
    float decay;       // 1 - learning_rate * weight_decay
    float step_size;   // learning_rate / (1 - beta1^step)
    float grad_scale;  // unscale factor times clip factor
};

namespace rewarm {

#if defined(__CUDA_ARCH__)
REWARM_INLINE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
REWARM_INLINE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
REWARM_INLINE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
REWARM_INLINE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
REWARM_INLINE float sqrt_rn(float a) { return __fsqrt_rn(a); }
#else
REWARM_INLINE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
REWARM_INLINE float mul_rn(float a, float b) { return a * b; }
REWARM_INLINE float sub_rn(float a, float b) { return a - b; }
REWARM_INLINE float div_rn(float a, float b) { return a / b; }
REWARM_INLINE float sqrt_rn(float a) { return __builtin_sqrtf(a); }
#endif

REWARM_INLINE void adamw(const rewarm_adamw_step& step, float grad, float& param, float& moment1, float& moment2) {
    const float g = mul_rn(grad, step.grad_scale);
    moment1 = fma_rn(step.one_minus_beta1, sub_rn(g, moment1), moment1);
    moment2 = fma_rn(moment2, step.beta2, mul_rn(step.one_minus_beta2, mul_rn(g, g)));
    const float denominator = fma_rn(sqrt_rn(moment2), step.inverse_sqrt_correction2, step.epsilon);
    param = fma_rn(-step.step_size, div_rn(moment1, denominator), mul_rn(param, step.decay));
}

}  // namespace rewarm
