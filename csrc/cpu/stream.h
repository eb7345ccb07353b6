// Stores that bypass the caches.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace rewarm {

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
