"""Evidence for each system: contenders, measurements, claims."""
