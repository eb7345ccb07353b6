"""The parts of ``offload_rivals.py``: what competes, how large, and what is written down."""
