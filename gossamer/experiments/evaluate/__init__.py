"""What the systems of the evaluate room claim, and how it is measured."""
