"""The vLLM fleet over HTTP, and the vLLM-side weight receiver."""
