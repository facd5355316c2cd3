"""What calibration data tell: statistics, moments, importance, and two walks that carry them through a network."""
