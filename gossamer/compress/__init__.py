"""Smaller networks: prune, quantize, factorize, distil, merge."""
