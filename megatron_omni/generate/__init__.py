"""Decoding: from conditioning hidden states to codes, step by step."""
