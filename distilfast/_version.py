"""The version. A build reads this file without importing torch."""

__version__ = "0.1.0"
