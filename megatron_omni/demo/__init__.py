"""The demo's own material: a grammar, the eSpeak voices that speak it, and a small codec fitted to them."""
