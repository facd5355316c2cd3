"""Timings: `benchmark()` of a network of one's own, `ptq4cuda bench` of operators, `bench-models` of networks."""
