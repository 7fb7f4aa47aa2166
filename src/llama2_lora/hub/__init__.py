"""Hugging Face's hub: listing, downloading and verifying files, some of them in pieces."""
