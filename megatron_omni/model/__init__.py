"""The math: blocks, encoder, projector, LLM, audio head, and the omni model that joins them."""
