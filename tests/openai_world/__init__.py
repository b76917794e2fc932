"""Servers with OpenAI's interface on this machine: the real llama.cpp, and answers shaped as vLLM shapes them."""
