"""Downloads from the Hugging Face hub and from ModelScope: weights, tokenizer and config only, never code."""
