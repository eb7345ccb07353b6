"""Where the build puts the compiled libraries; :mod:`rewarm.kernels.native` loads them."""
