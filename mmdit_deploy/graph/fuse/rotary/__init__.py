"""RoPE: read channel by channel."""
