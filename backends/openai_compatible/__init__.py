"""Servers that speak OpenAI's HTTP interface: vLLM, llama.cpp, SGLang and hosted services."""
