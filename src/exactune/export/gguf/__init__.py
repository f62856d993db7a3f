"""GGUF files from the model in memory, each proven in llama.cpp before it gets its name."""
