"""Timings: `ptq4cuda bench` of operators, `ptq4cuda bench-models` of whole networks."""
