"""What the systems of the hardware room claim, and how it is measured."""
