"""What a network costs on a machine."""
