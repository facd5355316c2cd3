"""Execution in integers: which layers, by what engines."""
