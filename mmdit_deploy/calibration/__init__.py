"""What the eager model's values are like, and what follows: scales, fp32 islands, which layers to quantize."""
