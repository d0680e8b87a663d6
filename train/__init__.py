"""SoFT training."""
