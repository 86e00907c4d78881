"""The Hugging Face Hub, from a server on loopback."""
