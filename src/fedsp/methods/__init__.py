"""The paper lives in `fedsp.algorithm`; each baseline will be one file here, of the one shape in `base`."""
