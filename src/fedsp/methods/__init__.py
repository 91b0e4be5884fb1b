"""Every method of a federation but FedSP itself: the shape they share, and one file for each baseline."""
