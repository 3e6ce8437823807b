"""Pruning: a criterion scores units, an allocation chooses how many, a schedule says when."""
