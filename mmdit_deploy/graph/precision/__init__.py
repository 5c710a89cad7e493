"""The precision plan in the graph: Q/DQ, FP8 attentions and fp32 islands, in few variants of the functions."""
