"""ssd_runtime: speculative speculative decoding on separate devices. See ARCHITECTURE.md for the walk of a round."""

__version__ = "0.1.0"
