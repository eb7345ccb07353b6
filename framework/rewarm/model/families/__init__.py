"""The model families, one page each: their tensors and those of Megatron-Core, their config.json, what they refuse."""
