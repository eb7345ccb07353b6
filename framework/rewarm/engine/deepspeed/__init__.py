"""The engine on DeepSpeed ZeRO: any causal language model of transformers."""
