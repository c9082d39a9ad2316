"""STAFF: pick the part of a fine-tuning data set that a large language model really needs, at a small model's price."""

__version__ = "0.1.0"
