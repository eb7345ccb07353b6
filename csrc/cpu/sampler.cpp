#include "sampler.h"

#include <vector>

// One copy of the picks for each vector width; the loader chooses what this processor has.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define REWARM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define REWARM_CLONES
#endif

namespace {

constexpr int64_t kTotal = int64_t{1} << 32;
constexpr int kRounds = 8;

struct Widths {
    int right_bits;
    uint64_t left_mask;
    uint64_t right_mask;
};

Widths widths_of(uint64_t size) {
    int bits = 2;
    while (bits < 63 && (uint64_t{1} << bits) < size) ++bits;
    const int right = bits / 2;
    return {right, (uint64_t{1} << (bits - right)) - 1, (uint64_t{1} << right) - 1};
}

inline uint64_t mix(uint64_t value, uint64_t key) {
    value = (value ^ key) * 0xFF51AFD7ED558CCDull;
    value = (value ^ (value >> 32)) * 0xC4CEB9FE1A85EC53ull;
    return value >> 32;
}

inline uint64_t permute(uint64_t value, uint64_t size, const Widths& widths, const uint64_t* keys) {
    do {
        uint64_t left = value >> widths.right_bits;
        uint64_t right = value & widths.right_mask;
        for (int round = 0; round < kRounds; round += 2) {
            left ^= mix(right, keys[round]) & widths.left_mask;
            right ^= mix(left, keys[round + 1]) & widths.right_mask;
        }
        value = (left << widths.right_bits) | right;
    } while (value >= size);
    return value;
}

// Adds the weights and returns the lowest index of the largest credit. Two passes without an early exit, because the
// compiler turns both into vector instructions.
inline int64_t add_and_find(int64_t num_domains, const int64_t* __restrict weights, int64_t* __restrict credits) {
    int64_t largest = INT64_MIN;
    for (int64_t i = 0; i < num_domains; ++i) {
        const int64_t credit = credits[i] + weights[i];
        credits[i] = credit;
        largest = credit > largest ? credit : largest;
    }
    int64_t chosen = num_domains;
    for (int64_t i = 0; i < num_domains; ++i) {
        const int64_t place = credits[i] == largest ? i : num_domains;
        chosen = place < chosen ? place : chosen;
    }
    return chosen;
}

// Picks up to n samples; windows[] receives each sample's offset within its epoch. Returns how many were picked.
REWARM_CLONES int64_t pick(int64_t num_domains, const int64_t* weights, int64_t* credits, int64_t* cursors,
                           const int64_t* sizes, const int64_t* epoch_starts, int64_t n, int64_t* domains,
                           int64_t* windows, int64_t* missing) {
    for (int64_t sample = 0; sample < n; ++sample) {
        const int64_t chosen = add_and_find(num_domains, weights, credits);
        const int64_t offset = cursors[chosen] - epoch_starts[chosen];
        if (epoch_starts[chosen] < 0 || offset < 0 || offset >= sizes[chosen]) {
            for (int64_t i = 0; i < num_domains; ++i) credits[i] -= weights[i];
            *missing = chosen;
            return sample;
        }
        credits[chosen] -= kTotal;
        ++cursors[chosen];
        domains[sample] = chosen;
        windows[sample] = offset;
    }
    return n;
}

}  // namespace

extern "C" int64_t rewarm_sampler_draw(int64_t num_domains, const int64_t* weights, int64_t* credits,
                                       int64_t* cursors, const int64_t* sizes, const int64_t* key_epochs,
                                       const uint64_t* keys, int64_t n, int64_t* domains, int64_t* windows,
                                       int64_t* missing) {
    std::vector<Widths> widths(num_domains);
    std::vector<int64_t> epoch_starts(num_domains);
    for (int64_t i = 0; i < num_domains; ++i) {
        widths[i] = widths_of(static_cast<uint64_t>(sizes[i]));
        epoch_starts[i] = key_epochs[i] < 0 ? -1 : key_epochs[i] * sizes[i];
    }
    *missing = -1;
    const int64_t drawn = pick(num_domains, weights, credits, cursors, sizes, epoch_starts.data(), n, domains, windows,
                               missing);
    // Apart from the picks, so that the permutations of neighbouring samples overlap in the processor.
    for (int64_t sample = 0; sample < drawn; ++sample) {
        const int64_t chosen = domains[sample];
        windows[sample] = static_cast<int64_t>(permute(static_cast<uint64_t>(windows[sample]),
                                                       static_cast<uint64_t>(sizes[chosen]), widths[chosen],
                                                       keys + chosen * kRounds));
    }
    return drawn;
}
