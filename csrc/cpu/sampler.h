// Picks of the sampler: the same numbers as framework/rewarm/mixing/order.py, some hundred times faster.
#ifndef REWARM_SAMPLER_H
#define REWARM_SAMPLER_H

#include <cstdint>

extern "C" {

// Draws the next samples of a mixture.
//
//   num_domains   K
//   weights       [K], not negative, summing to 2^32
//   credits       [K], in and out
//   cursors       [K], samples drawn so far from each domain, in and out
//   sizes         [K], windows of each domain, positive
//   key_epochs    [K], the epoch that each row of keys belongs to
//   keys          [K, 8], Feistel round keys
//   n             samples asked for
//   domains       [n], out
//   windows       [n], out
//   missing       out: a domain whose keys are of another epoch than its cursor, or -1
//
// Returns how many samples were drawn: n, or fewer when it stopped for `missing`; nothing of the sample it stopped
// at has then been counted.
int64_t rewarm_sampler_draw(int64_t num_domains, const int64_t* weights, int64_t* credits, int64_t* cursors,
                            const int64_t* sizes, const int64_t* key_epochs, const uint64_t* keys, int64_t n,
                            int64_t* domains, int64_t* windows, int64_t* missing);
}

#endif
