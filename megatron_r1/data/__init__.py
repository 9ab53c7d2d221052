"""Tokenizer, corpus, tasks, questions, packing."""
