"""From Sentinel-2 tiles to a land-cover service that can be trusted."""

__version__ = "0.1.0"
