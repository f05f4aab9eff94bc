"""Trained agents in the Hugging Face Hub."""
