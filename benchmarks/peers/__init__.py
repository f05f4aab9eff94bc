"""Speed of recurrent PPO beside that of other libraries; `python -m benchmarks.peers`."""
