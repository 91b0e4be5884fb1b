"""Questions: files, tasks, encoding, partition."""
