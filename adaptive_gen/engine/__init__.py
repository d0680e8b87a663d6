"""The engine: segments of layers with a queue in front of each, and one loop over them."""
