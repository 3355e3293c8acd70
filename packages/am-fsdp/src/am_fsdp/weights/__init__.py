"""Hugging Face folders and adapters, read into shards and written from them."""
