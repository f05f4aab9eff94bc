"""Vector environments as agents meet them: what they answer, those of gymnasium, workers, memory inputs."""
