"""What the systems of the data room claim, and how it is measured."""
