"""From measurements to quantizers and integer weights: closed forms, searches, least squares, rounding."""
