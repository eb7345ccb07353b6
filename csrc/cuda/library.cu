// What the loader asks the CUDA library first.
#include <cuda_runtime.h>

#ifndef REWARM_BUILD
#error "define REWARM_BUILD as the package version and the digest of csrc/ (setup.py does)"
#endif

extern "C" {

const char* rewarm_build() { return REWARM_BUILD; }

// The text of an error code that the other functions return.
const char* rewarm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
}
