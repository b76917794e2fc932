"""A llama-architecture model in this process: GGUF weights, a numpy engine, its tokenizer."""
