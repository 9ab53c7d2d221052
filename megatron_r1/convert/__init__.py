"""Checkpoints in and out of Hugging Face formats, tensor by tensor on a CPU with bounded memory."""
