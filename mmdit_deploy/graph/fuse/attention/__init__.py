"""Attention: from products and a softmax, its masks, its layout."""
