"""Learning from demonstrations: episodes recorded or read, and policies that imitate them."""
