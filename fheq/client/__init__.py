"""What the client does in the clear: how inputs are encoded, and what is computed after decryption."""
