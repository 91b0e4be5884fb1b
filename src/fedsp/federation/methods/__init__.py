"""What clients hold and what is tuned, by method."""
