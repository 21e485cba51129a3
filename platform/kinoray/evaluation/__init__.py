"""What an evaluation says, written and read back."""
