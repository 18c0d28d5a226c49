"""The models: architecture, weights, tokenizer and the one decoder. Knows no ranks, no requests."""
