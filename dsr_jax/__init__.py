"""Dual self-rewards for unified multimodal models, in JAX (arXiv 2506.07963)."""
