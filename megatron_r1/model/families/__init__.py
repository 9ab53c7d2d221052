"""One Hugging Face architecture a file."""
