// Streams through memory: prefetched loads, and stores that bypass the caches.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/numeric.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace rewarm {

// Elements of one turn: a tile's 16-bit copy is two whole cache lines, and its size is known to the compiler.
constexpr int64_t TILE = 64;

// How far ahead of the work its lines are asked for. Processors' own prefetchers stop at page ends and follow fewer
// streams than an update has. Asking for lines behind the end of an array is harmless.
constexpr int64_t PREFETCH_TILES = 16;

template <class Element>
REWARM_INLINE void prefetch_tile(const Element* array, int64_t first) {
    const char* tile = reinterpret_cast<const char*>(array + first);
    for (int64_t byte = 0; byte < TILE * int64_t(sizeof(Element)); byte += 64) __builtin_prefetch(tile + byte);
}

// Copy 16-bit elements with non-temporal stores; unaligned ends are stored as usual.
inline void stream_copy(uint16_t* target, const uint16_t* source, int64_t elements) {
#if defined(__x86_64__)
    int64_t i = 0;
    while (i < elements && (reinterpret_cast<uintptr_t>(target + i) & 15)) {
        target[i] = source[i];
        i++;
    }
    for (; i + 8 <= elements; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), eight);
    }
    for (; i < elements; i++) target[i] = source[i];
#else
    std::memcpy(target, source, size_t(elements) * 2);
#endif
}

// Make streamed stores visible to whoever is told that they are done.
inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace rewarm
