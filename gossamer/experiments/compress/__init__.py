"""Evidence for the compress room."""
