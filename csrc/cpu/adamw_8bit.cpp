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

// The update of one block in fp32; what its moments became stays in `m` and `v`. Returns their largest magnitudes.
template <int GRAD, int OUT>
REWARM_INLINE void update_block(const QuantizedState& s, const rewarm_adamw_step& step, int64_t block, int64_t count,
                                float* __restrict__ m, float* __restrict__ v, uint32_t* largest) {
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
        adamw(step, load<GRAD>(s.grad, first + i), p, moment1, moment2);
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

template <int GRAD, int OUT>
struct UpdateQuantized {
    QuantizedState s;
    rewarm_adamw_step step;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const {
        alignas(64) float m[QUANTIZED_BLOCK], v[QUANTIZED_BLOCK];
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * QUANTIZED_BLOCK, count = std::min(QUANTIZED_BLOCK, s.elements - first);
            uint32_t largest[2];
            update_block<GRAD, OUT>(s, step, block, count, m, v, largest);
            s.scale1[block] = scale_of(largest[0], SIGNED.top());
            s.scale2[block] = scale_of(largest[1], UNSIGNED.top());
            const float inverse1 = inverse_of(s.scale1[block]), inverse2 = inverse_of(s.scale2[block]);
            uint8_t* __restrict__ codes1 = s.moment1 + first;
            uint8_t* __restrict__ codes2 = s.moment2 + first;
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) codes1[i] = quantize_signed(m[i], inverse1);
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++) codes2[i] = quantize_unsigned(v[i], inverse2);
        }
    }
};

template <int GRAD, int OUT>
int start(const QuantizedState& state, const rewarm_adamw_step& step, int threads, int isa) {
    const int64_t blocks = (state.elements + QUANTIZED_BLOCK - 1) / QUANTIZED_BLOCK;
    run(UpdateQuantized<GRAD, OUT>{state, step}, blocks, threads, isa, QUANTIZED_BLOCK);
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

// The 256 values of the first (signed) and the second moment's codes.
void rewarm_codebooks(float* signed_values, float* unsigned_values) {
    std::copy_n(rewarm::SIGNED.value, 256, signed_values);
    std::copy_n(rewarm::UNSIGNED.value, 256, unsigned_values);
}
}
