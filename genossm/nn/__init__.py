"""Layers: mixers, blocks, heads, initialisation. They need torch alone."""
