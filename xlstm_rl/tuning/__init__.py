"""The search of settings for a task: a portfolio first, then Optuna, on one machine or several."""
