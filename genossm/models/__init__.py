"""Backbones: one file each, found by their `model_type`. This folder is the list; there is no registry."""
