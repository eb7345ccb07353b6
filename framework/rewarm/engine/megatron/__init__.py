"""The engine on Megatron-Core: tensor, pipeline and data parallelism over its layers, schedules and optimizer.

Importing this package readies Megatron-Core for the machine's device, so that its modules can import it plainly.
"""

from rewarm.engine.megatron import compat

compat.install()
