"""Evidence for quantization."""
