"""Engines: what turns a batch into an optimizer step on many ranks."""
