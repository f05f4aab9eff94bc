"""Agents x tasks x seeds: trained side by side, measured alike and laid out on one report card."""
