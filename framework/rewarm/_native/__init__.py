"""Where the build puts the compiled libraries; :mod:`rewarm.native` loads them."""
