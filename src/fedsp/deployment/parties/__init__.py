"""Who takes part in a deployment: keys, certificates and folders, and how clients come and go."""
