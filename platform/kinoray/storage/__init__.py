"""Bytes from and to s3:// or a folder: retries, checksums, put-if-absent."""
