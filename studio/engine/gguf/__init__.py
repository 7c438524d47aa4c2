"""GGUF, the format of llama.cpp, Ollama and LM Studio: written, read back, and run where llama.cpp is installed."""
