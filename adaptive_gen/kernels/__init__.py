"""What a decoding step is made of, for tokens laid out flat, at fixed shapes.

Axes: `tokens` (all rows' tokens, row after row, filled up to a fixed number), `slots` (rows of the
K/V buffers), `heads`, `kv_heads`, `head_dim`, `capacity`, `vocab`.
"""
