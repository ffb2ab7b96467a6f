"""Sums in the fixed tree: who has which leaf, the sum itself, and sums while shards still run."""
