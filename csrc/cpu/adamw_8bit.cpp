// AdamW on the CPU with moments kept as block-wise quantised bytes: approximate.
#include "../common/quantize.h"

#include "parallel.h"
#include "stream.h"

namespace rewarm {
namespace {

constexpr Codebook<SIGNED_WIDTH> SIGNED;
constexpr Codebook<UNSIGNED_WIDTH> UNSIGNED;

struct QuantizedState {
    int64_t elements;
    float* master;
    uint8_t* moment1;
    uint8_t* moment2;
    float* scale1;  // one per block
    float* scale2;
    const void* grad;
    void* out;
};

int64_t blocks_of(int64_t elements) { return (elements + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK; }

// The update of one block in fp32; what its moments became stays in `m` and `v`, and what the first moment has to be
// below in `ceiling`. Returns the largest magnitudes.
template <int GRAD, int OUT>
REWARM_INLINE void update_block(const QuantizedState& s, const rewarm_adamw_step& step, int64_t block, int64_t count,
                                float* __restrict__ m, float* __restrict__ v, float* __restrict__ ceiling,
                                uint32_t* largest) {
    const int64_t first = block * QUANTIZED_BLOCK;
    float* __restrict__ master = s.master + first;
    const uint8_t* __restrict__ codes1 = s.moment1 + first;
    const uint8_t* __restrict__ codes2 = s.moment2 + first;
    const float scale1 = s.scale1[block], scale2 = s.scale2[block];
    uint32_t largest1 = 0, largest2 = 0;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
        float p = master[i];
        float moment1 = mul_rn(SIGNED.value[codes1[i]], scale1), moment2 = mul_rn(UNSIGNED.value[codes2[i]], scale2);
        const float grad = load<GRAD>(s.grad, first + i);
        ceiling[i] = ceiling_of(mul_rn(grad, step.grad_scale), moment1);
        adamw(step, grad, p, moment1, moment2);
        master[i] = p;
        m[i] = moment1;
        v[i] = moment2;
        if (OUT != NONE) store<OUT>(static_cast<uint16_t*>(s.out) + first, i, p);
        largest1 = std::max(largest1, bits_of(moment1) & 0x7FFFFFFFu);
        largest2 = std::max(largest2, bits_of(moment2) & 0x7FFFFFFFu);
    }
    largest[0] = largest1;
    largest[1] = largest2;
}

// Keeps the moments of one block.
REWARM_INLINE void store_block(const QuantizedState& s, int64_t block, int64_t count, const float* __restrict__ m,
                               const float* __restrict__ v, const uint32_t* largest) {
    const int64_t first = block * QUANTIZED_BLOCK;
    const float scale1 = scale_of(largest[0]), scale2 = scale_of(largest[1]);
    s.scale1[block] = scale1;
    s.scale2[block] = scale2;
    const float inverse1 = inverse_of<SIGNED_WIDTH>(scale1), inverse2 = inverse_of<UNSIGNED_WIDTH>(scale2);
    uint8_t* __restrict__ codes1 = s.moment1 + first;
    uint8_t* __restrict__ codes2 = s.moment2 + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) codes1[i] = quantize_signed(m[i], inverse1);
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) codes2[i] = quantize_unsigned(v[i], inverse2);
}

// Lets go of first moments that only rounding holds.
REWARM_INLINE void ebb_block(const QuantizedState& s, int64_t block, int64_t count,
                             const float* __restrict__ ceiling) {
    uint8_t* __restrict__ codes1 = s.moment1 + block * QUANTIZED_BLOCK;
    const float scale1 = s.scale1[block];
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++)
        codes1[i] = ebb(codes1[i], mul_rn(SIGNED.value[codes1[i]], scale1), ceiling[i]);
}

template <int GRAD, int OUT>
struct UpdateQuantized {
    QuantizedState s;
    rewarm_adamw_step step;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        alignas(64) float m[QUANTIZED_BLOCK], v[QUANTIZED_BLOCK], ceiling[QUANTIZED_BLOCK];
        for (int64_t block = begin; block < end; block++) {
            const int64_t count = std::min(QUANTIZED_BLOCK, s.elements - block * QUANTIZED_BLOCK);
            uint32_t largest[2];
            update_block<GRAD, OUT>(s, step, block, count, m, v, ceiling, largest);
            store_block(s, block, count, m, v, largest);
            ebb_block(s, block, count, ceiling);
        }
    }
};

struct Quantize {
    QuantizedState s;
    const float* m;
    const float* v;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * QUANTIZED_BLOCK, count = std::min(QUANTIZED_BLOCK, s.elements - first);
            uint32_t largest[2] = {0, 0};
            for (int64_t i = first; i < first + count; i++) {
                largest[0] = std::max(largest[0], bits_of(m[i]) & 0x7FFFFFFFu);
                largest[1] = std::max(largest[1], bits_of(v[i]) & 0x7FFFFFFFu);
            }
            store_block(s, block, count, m + first, v + first, largest);
        }
    }
};

struct Dequantize {
    QuantizedState s;
    float* m;
    float* v;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * QUANTIZED_BLOCK, last = std::min(first + QUANTIZED_BLOCK, s.elements);
            const float scale1 = s.scale1[block], scale2 = s.scale2[block];
            for (int64_t i = first; i < last; i++) m[i] = mul_rn(SIGNED.value[s.moment1[i]], scale1);
            for (int64_t i = first; i < last; i++) v[i] = mul_rn(UNSIGNED.value[s.moment2[i]], scale2);
        }
    }
};

template <int GRAD, int OUT>
int start(const QuantizedState& state, const rewarm_adamw_step& step, int threads, int isa) {
    run(UpdateQuantized<GRAD, OUT>{state, step}, blocks_of(state.elements), threads, isa, QUANTIZED_BLOCK);
    return 0;
}

template <int GRAD>
int start_for_out(const QuantizedState& state, const rewarm_adamw_step& step, int out, int threads, int isa) {
    switch (out) {
        case NONE: return start<GRAD, NONE>(state, step, threads, isa);
        case BFLOAT16: return start<GRAD, BFLOAT16>(state, step, threads, isa);
        case FLOAT16: return start<GRAD, FLOAT16>(state, step, threads, isa);
        default: return -1;
    }
}

}  // namespace
}  // namespace rewarm

extern "C" {

// rewarm_adamw with moments as codes of one byte and one fp32 scale per 2048 elements. Returns 0, or -1 if a type is
// not supported.
int rewarm_adamw_8bit(int64_t elements, float* master, uint8_t* moment1, uint8_t* moment2, float* scale1,
                      float* scale2, const void* grad, int grad_type, void* out, int out_type,
                      const rewarm_adamw_step* step, int threads, int isa) {
    using namespace rewarm;
    const QuantizedState state{elements, master, moment1, moment2, scale1, scale2, grad, out};
    switch (grad_type) {
        case FLOAT32: return start_for_out<FLOAT32>(state, *step, out_type, threads, isa);
        case BFLOAT16: return start_for_out<BFLOAT16>(state, *step, out_type, threads, isa);
        case FLOAT16: return start_for_out<FLOAT16>(state, *step, out_type, threads, isa);
        default: return -1;
    }
}

// fp32 moments to codes and scales.
void rewarm_quantize_moments(int64_t elements, const float* m, const float* v, uint8_t* moment1, uint8_t* moment2,
                             float* scale1, float* scale2, int threads) {
    using namespace rewarm;
    const QuantizedState state{elements, nullptr, moment1, moment2, scale1, scale2, nullptr, nullptr};
    run(Quantize{state, m, v}, blocks_of(elements), threads, -1, QUANTIZED_BLOCK);
}

// Codes and scales to fp32 moments.
void rewarm_dequantize_moments(int64_t elements, uint8_t* moment1, uint8_t* moment2, float* scale1, float* scale2,
                               float* m, float* v, int threads) {
    using namespace rewarm;
    const QuantizedState state{elements, nullptr, moment1, moment2, scale1, scale2, nullptr, nullptr};
    run(Dequantize{state, m, v}, blocks_of(elements), threads, -1, QUANTIZED_BLOCK);
}

// The 256 values of the first (signed) and the second moment's codes.
void rewarm_codebooks(float* signed_values, float* unsigned_values) {
    std::copy_n(rewarm::SIGNED.value, 256, signed_values);
    std::copy_n(rewarm::UNSIGNED.value, 256, unsigned_values);
}
}
