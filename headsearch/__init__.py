"""A search service for projection heads: which one, and how small can its output be."""

__version__ = "0.1.0"
