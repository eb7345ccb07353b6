// Conversions between fp32 and 16-bit formats, written once for the CPU and for CUDA.
//
// All are integer or exactly rounded operations, so every instruction set and every device gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define REWARM_INLINE __host__ __device__ __forceinline__
#else
#define REWARM_INLINE inline __attribute__((always_inline))
#endif

namespace rewarm {

enum DataType : int { NONE = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

REWARM_INLINE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
#endif
}

REWARM_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

REWARM_INLINE float from_bfloat16(uint16_t half) { return float_of(uint32_t(half) << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
REWARM_INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet : rounded);
}

REWARM_INLINE float from_float16(uint16_t half) {
    // Shifting the exponent into place leaves it 112 too small; the product mends that and normalises subnormals.
    const uint32_t magnitude = uint32_t(half & 0x7FFFu) << 13;
    const uint32_t finite = bits_of(float_of(magnitude) * float_of(0x77800000u));
    const uint32_t special = magnitude | 0x7F800000u;
    const uint32_t unsigned_bits = magnitude >= 0x0F800000u ? special : finite;
    return float_of(unsigned_bits | (uint32_t(half & 0x8000u) << 16));
}

// Round to nearest, ties to even; overflow gives infinity, a NaN stays a NaN.
REWARM_INLINE uint16_t to_float16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 moves the bits of a subnormal half to the bottom of the word, rounded by the adder itself.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
}

// A 32-bit mixer with full avalanche (two multiply-xorshift rounds, constants of C. Wellons' hash-prospector).
REWARM_INLINE uint32_t mix(uint32_t word) {
    word ^= word >> 16;
    word *= 0x7FEB352Du;
    word ^= word >> 15;
    word *= 0x846CA68Bu;
    return word ^ (word >> 16);
}

// Sixteen random bits of element `index` under `seed`; a pure function, whoever computes it and in which order.
REWARM_INLINE uint32_t noise16(uint64_t index, uint64_t seed) {
    const uint32_t low = mix(uint32_t(index) ^ uint32_t(seed));
    return mix(low + uint32_t(index >> 32) * 0x9E3779B9u + uint32_t(seed >> 32)) >> 16;
}

// Round up with the probability of the discarded fraction, so that the mean of the result is the value.
REWARM_INLINE uint16_t to_bfloat16_stochastic(float value, uint32_t noise) {
    const uint32_t bits = bits_of(value);
    const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
    return finite ? uint16_t((bits + noise) >> 16) : to_bfloat16(value);
}

// An fp32 number as the bf16 number nearest to it and its low 16 bits. `high` is what to_bfloat16 gives, so it is the
// model's own parameter. The two do not tell apart the ties that were rounded up from those rounded down; `tie_up`
// does, and travels in the sign of the second moment, which is never negative.
//
// Flags are words of 0 or 1 and not booleans, so that compilers vectorise the loops over them.
struct Split {
    uint16_t high;
    uint16_t low;
    uint32_t tie_up;
};

REWARM_INLINE Split split(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t low = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0u : bits & 0xFFFFu;  // a NaN has no remainder
    const uint32_t odd = (bits >> 16) & 1u;
    return Split{to_bfloat16(value), uint16_t(low), low == 0x8000u ? odd : 0u};
}

REWARM_INLINE float join(uint16_t high, uint16_t low, uint32_t tie_up) {
    // The carry out of the low half says whether rounding moved the high half: above a tie always, on a tie if told.
    const uint32_t rounded_up = (uint32_t(low) + 0x7FFFu + tie_up) >> 16;
    return float_of(((uint32_t(high) - rounded_up) << 16) | low);
}

REWARM_INLINE float with_sign(float magnitude, uint32_t negative) {
    return float_of((bits_of(magnitude) & 0x7FFFFFFFu) | (negative << 31));
}

REWARM_INLINE uint32_t sign_of(float value) { return bits_of(value) >> 31; }

template <int TYPE>
REWARM_INLINE float load(const void* source, int64_t i) {
    if (TYPE == BFLOAT16) return from_bfloat16(static_cast<const uint16_t*>(source)[i]);
    if (TYPE == FLOAT16) return from_float16(static_cast<const uint16_t*>(source)[i]);
    return static_cast<const float*>(source)[i];
}

template <int TYPE>
REWARM_INLINE void store(void* target, int64_t i, float value) {
    if (TYPE == BFLOAT16) static_cast<uint16_t*>(target)[i] = to_bfloat16(value);
    if (TYPE == FLOAT16) static_cast<uint16_t*>(target)[i] = to_float16(value);
    if (TYPE == FLOAT32) static_cast<float*>(target)[i] = value;
}

}  // namespace rewarm
