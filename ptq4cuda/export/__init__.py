"""Quantized networks as files for other runtimes, each made of a LayerProgram."""
