"""What remains of a quantization: its record, report and file."""
