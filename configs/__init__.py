"""Configs: `base.py` holds every key; each other file is a recipe with a `get_config(arg)`."""
