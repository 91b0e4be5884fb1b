"""What is read, and what is tuned."""
