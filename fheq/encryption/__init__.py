"""What encryption does to values: noise, tables that fail, and what decryption makes of a ciphertext."""
