"""Typed configuration: one YAML file is one stage of training."""
