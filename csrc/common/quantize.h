// Block-wise dynamic 8-bit quantisation (Dettmers et al., 2021, "8-bit Optimizers via Block-wise Quantization").
//
// A number is a code times the scale of its block. The code of a magnitude has `WIDTH` bits: n zeros say that it lies
// in the decade [10^-(n+1), 10^-n), a one ends them, the bits that are left cut the decade into equal cells whose
// middle is the value. All values are then divided by the largest, so that it is 1 and the scale is the block's largest
// magnitude itself: what was quantised once has the same codes and scale when it is quantised again. With a sign (first
// moment) WIDTH is 7, without (second moment) 8. A second moment never becomes zero by rounding, for a step divides by
// it. A first moment that gradients no longer feed never stays by rounding, for it would move its parameter for ever.
#pragma once

#include "adamw.h"

namespace rewarm {

constexpr int64_t QUANTIZED_BLOCK = 2048;  // elements that share a scale; the size that the paper chose

constexpr int SIGNED_WIDTH = 7, UNSIGNED_WIDTH = 8;

// Scales below this have no inverse in fp32; such a block is kept as zeros.
constexpr float LEAST_SCALE = 1e-37f;

// The middle of the last cell of the first decade.
template <int WIDTH>
constexpr double TOP = 0.1 + 0.9 * ((1 << (WIDTH - 1)) - 0.5) / (1 << (WIDTH - 1));

// The values of all codes of a width, computed in double precision and rounded once.
template <int WIDTH>
struct Codebook {
    float value[256];

    constexpr Codebook() : value{} {
        double decade = 1;
        for (int cells = 1 << (WIDTH - 1); cells >= 1; cells /= 2, decade /= 10)
            for (int j = 0; j < cells; j++) {
                const float middle = float(decade * (0.1 + 0.9 * (j + 0.5) / cells) / TOP<WIDTH>);
                value[cells + j] = middle;
                if (WIDTH == SIGNED_WIDTH) value[128 + cells + j] = -middle;
            }
    }
};

// The magnitude's code of y >= 0, in which the decades lie; 0 for what lies below the last one, and for a NaN.
template <int WIDTH>
REWARM_INLINE uint32_t encode(float y) {
    constexpr float BORDER[8] = {1e-1f, 1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-6f, 1e-7f, 1e-8f};
    constexpr float POWER[8] = {1e1f, 1e2f, 1e3f, 1e4f, 1e5f, 1e6f, 1e7f, 1e8f};
    uint32_t zeros = 0;
    float power = 1;
    for (int i = 0; i < WIDTH; i++) {
        const bool below = y < BORDER[i];
        zeros += below ? 1 : 0;
        power = below ? POWER[i] : power;
    }
    const int32_t cells = (1 << (WIDTH - 1)) >> (zeros < WIDTH ? zeros : WIDTH - 1);
    const float place = mul_rn(sub_rn(mul_rn(y, power), 0.1f), mul_rn(float(cells), 1 / 0.9f));
    const float inside = place > 0 ? place : 0;  // also for a NaN
    const int32_t cell = int32_t(inside < float(cells - 1) ? inside : float(cells - 1));
    return y == y && zeros < WIDTH ? uint32_t(cells + cell) : 0u;
}

// `inverse` is that of inverse_of.
REWARM_INLINE uint8_t quantize_signed(float x, float inverse) {
    const uint32_t code = encode<SIGNED_WIDTH>(mul_rn(float_of(bits_of(x) & 0x7FFFFFFFu), inverse));
    return uint8_t(code | (code ? sign_of(x) << 7 : 0u));
}

REWARM_INLINE uint8_t quantize_unsigned(float x, float inverse) {
    const uint32_t code = encode<UNSIGNED_WIDTH>(mul_rn(x, inverse));
    return uint8_t(code == 0 && x > 0 && inverse > 0 ? 1u : code);
}

// The magnitude below which a first moment has to be after a step: that before it where the gradient is far smaller,
// and infinity where a new gradient decides.
REWARM_INLINE float ceiling_of(float grad, float moment1) {
    const float before = float_of(bits_of(moment1) & 0x7FFFFFFFu);
    const bool fed = !(float_of(bits_of(grad) & 0x7FFFFFFFu) <= mul_rn(before, 0.0625f));
    return fed ? float_of(0x7F800000u) : before;
}

// The next smaller code where rounding has taken a first moment up to its ceiling again, as a cell that is wider than
// what the moment loses in a step does for ever. The largest of a block keeps its own: it is the scale. `kept` is the
// value of the code times the scale.
REWARM_INLINE uint8_t ebb(uint8_t code, float kept, float ceiling) {
    const uint32_t magnitude = code & 127u;
    const bool stays = float_of(bits_of(kept) & 0x7FFFFFFFu) >= ceiling && magnitude > 0 && magnitude < 127;
    return uint8_t(stays ? (magnitude == 1 ? 0u : code - 1u) : code);
}

// Largest magnitudes are compared as words, in which infinity and NaN lie above all numbers: they reach the scale.
REWARM_INLINE float scale_of(uint32_t largest_bits) {
    const float scale = float_of(largest_bits);
    return scale < LEAST_SCALE ? 0.0f : scale;
}

// What brings a number of a block into the decades of the code; 0 for a block of zeros.
template <int WIDTH>
REWARM_INLINE float inverse_of(float scale) {
    return scale > 0 ? div_rn(float(TOP<WIDTH>), scale) : 0.0f;
}

}  // namespace rewarm
