// AdamW on the CPU in one pass over the state.
//
// The body is plain C++ over the shared element update; each instruction set compiles it again under its target
// attribute, and the compiler vectorises it. A tail of any length runs the same operations one by one, so neither the
// length, the alignment, the cut nor the thread count changes a bit of the result.
#include "../common/adamw.h"

#include "parallel.h"
#include "stream.h"

namespace rewarm {
namespace {

struct State {
    float* master;
    uint16_t* high;  // with `low`, stands for `master` in the split form
    uint16_t* low;
    float* moment1;
    float* moment2;
    const void* grad;
    void* out;
    bool stream;  // write `out` past the caches
};

template <int GRAD>
REWARM_INLINE void prefetch_grad(const void* grad, int64_t first) {
    if (GRAD == FLOAT32) prefetch_tile(static_cast<const float*>(grad), first);
    else prefetch_tile(static_cast<const uint16_t*>(grad), first);
}

template <int GRAD, int OUT>
REWARM_INLINE void update_run(const State& s, const rewarm_adamw_step& step, int64_t first, int64_t count, void* out) {
    float* __restrict__ master = s.master + first;
    float* __restrict__ moment1 = s.moment1 + first;
    float* __restrict__ moment2 = s.moment2 + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
        float p = master[i], m = moment1[i], v = moment2[i];
        adamw(step, load<GRAD>(s.grad, first + i), p, m, v);
        master[i] = p;
        moment1[i] = m;
        moment2[i] = v;
        if (OUT != NONE) store<OUT>(out, i, p);
    }
}

// Elements before the first that begins a whole tile of `out`.
REWARM_INLINE int64_t before_tiles(const State& s, int64_t begin, int64_t end) {
    const int64_t place = int64_t(reinterpret_cast<uintptr_t>(static_cast<uint16_t*>(s.out) + begin) / 2 % TILE);
    return std::min(end - begin, (TILE - place) % TILE);
}

template <int GRAD, int OUT>
REWARM_INLINE void update(const State& s, const rewarm_adamw_step& step, int64_t begin, int64_t end) {
    uint16_t* out = static_cast<uint16_t*>(s.out);
    int64_t first = begin;
    if (OUT != NONE) {
        const int64_t head = before_tiles(s, begin, end);
        update_run<GRAD, OUT>(s, step, begin, head, out + begin);
        first += head;
    }
    alignas(64) uint16_t copy[TILE];
    for (; first + TILE <= end; first += TILE) {
        const int64_t ahead = first + PREFETCH_TILES * TILE;
        prefetch_tile(s.master, ahead);
        prefetch_tile(s.moment1, ahead);
        prefetch_tile(s.moment2, ahead);
        prefetch_grad<GRAD>(s.grad, ahead);
        update_run<GRAD, OUT>(s, step, first, TILE, s.stream ? copy : out + first);
        if (OUT != NONE && s.stream) stream_copy(out + first, copy, TILE);
    }
    update_run<GRAD, OUT>(s, step, first, end - first, out + first);
    if (OUT != NONE && s.stream) stream_fence();
}

template <int GRAD>
REWARM_INLINE void update_split_run(const State& s, const rewarm_adamw_step& step, int64_t first, int64_t count) {
    uint16_t* __restrict__ high = s.high + first;
    uint16_t* __restrict__ low = s.low + first;
    float* __restrict__ moment1 = s.moment1 + first;
    float* __restrict__ moment2 = s.moment2 + first;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; i++) {
        float v = moment2[i], m = moment1[i];
        float p = join(high[i], low[i], sign_of(v));
        v = with_sign(v, false);
        adamw(step, load<GRAD>(s.grad, first + i), p, m, v);
        const Split parts = split(p);
        high[i] = parts.high;
        low[i] = parts.low;
        moment1[i] = m;
        moment2[i] = with_sign(v, parts.tie_up);
    }
}

template <int GRAD>
REWARM_INLINE void update_split(const State& s, const rewarm_adamw_step& step, int64_t begin, int64_t end) {
    int64_t first = begin;
    for (; first + TILE <= end; first += TILE) {
        const int64_t ahead = first + PREFETCH_TILES * TILE;
        prefetch_tile(s.high, ahead);
        prefetch_tile(s.low, ahead);
        prefetch_tile(s.moment1, ahead);
        prefetch_tile(s.moment2, ahead);
        prefetch_grad<GRAD>(s.grad, ahead);
        update_split_run<GRAD>(s, step, first, TILE);
    }
    update_split_run<GRAD>(s, step, first, end - first);
}

template <int GRAD, int OUT>
struct Update {
    State state;
    rewarm_adamw_step step;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const { update<GRAD, OUT>(state, step, begin, end); }
};

template <int GRAD>
struct UpdateSplit {
    State state;
    rewarm_adamw_step step;
    REWARM_INLINE void operator()(int64_t begin, int64_t end) const { update_split<GRAD>(state, step, begin, end); }
};

template <int GRAD>
int update_for_out(const State& state, const rewarm_adamw_step& step, int out, int64_t elements, int threads, int isa) {
    switch (out) {
        case NONE: run(Update<GRAD, NONE>{state, step}, elements, threads, isa); return 0;
        case BFLOAT16: run(Update<GRAD, BFLOAT16>{state, step}, elements, threads, isa); return 0;
        case FLOAT16: run(Update<GRAD, FLOAT16>{state, step}, elements, threads, isa); return 0;
        default: return -1;
    }
}

// Streaming stores save the read of a line that is about to be overwritten, once the arrays outgrow the caches.
constexpr int64_t STREAM_ELEMENTS = 1 << 20;

}  // namespace
}  // namespace rewarm

extern "C" {

// Update `elements` of state in place. `out` (16-bit, may be null with out_type NONE) receives the rounded master.
// Returns 0, or -1 if a type is not supported.
int rewarm_adamw(int64_t elements, float* master, float* moment1, float* moment2, const void* grad, int grad_type,
                 void* out, int out_type, const rewarm_adamw_step* step, int threads, int isa) {
    using namespace rewarm;
    const State state{master, nullptr, nullptr, moment1, moment2, grad, out, elements >= STREAM_ELEMENTS};
    switch (grad_type) {
        case FLOAT32: return update_for_out<FLOAT32>(state, *step, out_type, elements, threads, isa);
        case BFLOAT16: return update_for_out<BFLOAT16>(state, *step, out_type, elements, threads, isa);
        case FLOAT16: return update_for_out<FLOAT16>(state, *step, out_type, elements, threads, isa);
        default: return -1;
    }
}

// The same update of a master kept as its bf16 rounding `high`, which is the model's parameter, and its low 16 bits;
// the sign of moment2 tells ties apart (csrc/common/numeric.h). Returns 0, or -1 if the type is not supported.
int rewarm_adamw_split(int64_t elements, uint16_t* high, uint16_t* low, float* moment1, float* moment2,
                       const void* grad, int grad_type, const rewarm_adamw_step* step, int threads, int isa) {
    using namespace rewarm;
    const State state{nullptr, high, low, moment1, moment2, grad, nullptr, false};
    switch (grad_type) {
        case FLOAT32: run(UpdateSplit<FLOAT32>{state, *step}, elements, threads, isa); return 0;
        case BFLOAT16: run(UpdateSplit<BFLOAT16>{state, *step}, elements, threads, isa); return 0;
        case FLOAT16: run(UpdateSplit<FLOAT16>{state, *step}, elements, threads, isa); return 0;
        default: return -1;
    }
}
}
